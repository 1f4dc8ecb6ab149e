"""Images in requests: what the server's rules allow, beside the event loop, within memory."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from servers import Running, in_thread, until
from typer.testing import CliRunner

from squall import Model
from squall.api import chats
from squall.api.messages import images_of
from squall.cli import serve
from squall.cli.serve import ServeFlags
from squall.errors import InvalidRequest
from squall.server.options import ServerOptions
from squall.vision.images import OWN, Media, read_all

CHAT = "/v1/chat/completions"


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


def data_url() -> str:
    return f"data:image/png;base64,{base64.b64encode(png()).decode()}"


def part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(*urls: str) -> dict[str, Any]:
    parts = [part(url) for url in urls]
    content = [{"type": "text", "text": "What is this?"}, *parts]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat(data_url())),
        ("/tokenize", {"messages": chat(data_url())["messages"]}),
        ("/render", chat(data_url())),
        ("/v1/responses", {"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": data_url()}]}]}),
        ("/v1/responses", {"input": [
            {"type": "function_call", "call_id": "a", "name": "see", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": [
                {"type": "input_image", "image_url": data_url()}]}]}),
        *((path, {"max_tokens": 2, "messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                         "data": base64.b64encode(png()).decode()}}]}]})
          for path in ("/v1/messages", "/v1/messages/count_tokens")),
    ],
)  # fmt: skip
def test_a_model_that_reads_no_images_says_so(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("this model reads no images")


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_images_of_others_are_refused(http: httpx.Client, role: str) -> None:
    for path, name, image in (
        (CHAT, "messages", part(data_url())),
        ("/v1/responses", "input", {"type": "input_image", "image_url": data_url()}),
        ("/v1/messages", "messages", {"type": "image", "source": {"type": "url", "url": "x"}}),
    ):
        said = [{"role": "user", "content": "a"}, {"role": role, "content": [image]}]
        response = http.post(path, json={name: said, "max_tokens": 1})
        assert response.status_code == 400, response.text
        assert "it must be a whole 'text'" in response.json()["error"]["message"]


class Seeing:
    """Reads images as a model that sees would, and answers what comes of the texts."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.read: list[Any] = []
        self.wait = threading.Event()
        self.wait.set()

    def prompt(self, model: Model, request: Any) -> Any:
        sources = [found["source"] for found in images_of(request.messages)]
        if sources:
            self.threads.append(threading.current_thread().name)
            assert self.wait.wait(30)
            self.read += [image.size for image in read_all(sources, model.media)]
        return model.chat_prompt([{"role": "user", "content": "Hi"}])


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seeing]:
    found = Seeing()
    monkeypatch.setattr(chats, "chat_prompt", found.prompt)
    yield found
    found.wait.set()


@pytest.fixture
def running(model: Model, tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.png").write_bytes(png((5, 4)))
    (tmp_path / "secret.png").write_bytes(png())
    media = Media(folder=tmp_path / "media", images=3)
    with in_thread(model, media=media, all_bodies_bytes=2**20) as found:
        yield found
    model.media = OWN


def test_images_are_read_by_the_rules(running: Running, seeing: Seeing) -> None:
    with httpx.Client(base_url=running.url, timeout=30) as http:
        found = http.post(CHAT, json=chat("a.png", data_url(), "file:a.png"))
        assert found.status_code == 200, found.text
        assert seeing.read == [(5, 4), (8, 8), (5, 4)]
        for urls, says in (
            (["../secret.png"], "it must be an http, https or data: URL"),
            (["file:///etc/passwd"], "it must be an http, https or data: URL"),
            (["http://127.0.0.1:1/a.png"], "not allowed; hosts: none"),
            (["http://169.254.169.254/"], "not allowed; hosts: none"),
            (["a.png"] * 4, "there are 4 images; at most 3"),
            (["data:image/svg+xml,<svg/>"], "SVG"),
            ([data_url()[:60]], "damaged, or was cut"),
        ):
            response = http.post(CHAT, json=chat(*urls))
            assert response.status_code == 400, response.text
            assert says in response.json()["error"]["message"]
    assert running.quiet()


def test_slow_images_keep_nobody_waiting(running: Running, seeing: Seeing) -> None:
    """They are read by other threads than texts, from whatever endpoint they come."""
    seeing.wait.clear()
    with httpx.Client(base_url=running.url, timeout=30) as http:

        def ask() -> None:
            assert httpx.post(running.url + CHAT, json=chat("a.png"), timeout=30).status_code == 200

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        until(lambda: len(seeing.threads) == 3)
        assert http.post(CHAT, json={"messages": "Hi", "max_tokens": 1}).status_code == 200
        assert http.post("/tokenize", json={"prompt": "Hi"}).status_code == 200
        seeing.wait.set()
        for thread in asking:
            thread.join()
    assert all(name.startswith("squall-reader") for name in seeing.threads)
    until(running.quiet)


def test_bodies_count_until_their_images_are_answered(running: Running, seeing: Seeing) -> None:
    seeing.wait.clear()
    url = data_url() + "=" * 600_000
    with httpx.Client(base_url=running.url, timeout=30) as http:
        thread = threading.Thread(
            target=httpx.post, args=(running.url + CHAT,), kwargs={"json": chat(url), "timeout": 30}
        )
        thread.start()
        until(lambda: bool(seeing.threads))
        until(lambda: running.service.bodies._held == len(url))
        assert http.post(CHAT, json=chat(url)).status_code == 429
        seeing.wait.set()
        thread.join()
        until(lambda: running.service.bodies._held == 0)
        assert http.post(CHAT, json=chat(url)).status_code == 200
    until(lambda: running.service.bodies._held == 0)


def test_responses_go_on_with_images(running: Running, seeing: Seeing) -> None:
    """What was shown is there again, unless it was not stored."""
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        content = [{"type": "input_image", "image_url": data_url(), "detail": "auto"}]
        message: Any = {"role": "user", "content": content}
        first = client.responses.create(model="any", input=[message], max_output_tokens=1)
        client.responses.create(
            model="any", input="And now?", previous_response_id=first.id, max_output_tokens=1
        )
    assert seeing.read == [(8, 8), (8, 8)]


def test_the_clients_vision_calls(running: Running, seeing: Seeing) -> None:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        messages: Any = chat(data_url(), "a.png")["messages"]
        client.chat.completions.create(model="any", messages=messages, max_tokens=1)
    assert seeing.read == [(8, 8), (5, 4)]


def test_bombs_and_broken_files_leave_the_server_alive(running: Running, seeing: Seeing) -> None:
    rng = np.random.default_rng(3)
    with httpx.Client(base_url=running.url, timeout=30) as http:
        for _ in range(40):
            data = bytearray(png())
            data[rng.integers(8, len(data))] ^= int(rng.integers(1, 256))
            url = f"data:;base64,{base64.b64encode(data).decode()}"
            assert http.post(CHAT, json=chat(url)).status_code in (200, 400)
        assert http.get("/health").status_code == 200
    assert len(seeing.threads) == 40


def test_flags(tmp_path: Path) -> None:
    given = ServeFlags(allow_media_url=["example.org", ".a.net:81"], allow_media_path=tmp_path)
    assert given.options().media == Media(hosts=("example.org", ".a.net:81"), folder=tmp_path)
    assert ServeFlags().options().media == ServerOptions().media == Media()
    for wrong in (
        ServeFlags(allow_media_url=["http://example.org"]),
        ServeFlags(allow_media_path=tmp_path / "absent"),
    ):
        with pytest.raises(InvalidRequest):
            wrong.options()


def test_the_command_has_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[ServeFlags] = []
    monkeypatch.setattr(serve, "_serve", lambda flags, *_: found.append(flags))
    flags = ["--allow-media-url", "a.org", "--allow-media-url", "*", "--allow-media-path", "."]
    assert CliRunner().invoke(serve.app, flags, standalone_mode=False).exit_code == 0
    assert found[0].options().media == Media(hosts=("a.org", "*"), folder=Path("."))
