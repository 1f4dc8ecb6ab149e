"""Pictures over HTTP: with OpenAI's client, as files that end, cancelled, and beside chats."""

from __future__ import annotations

import base64
import gc
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from painters import GENERATIONS, Running, serving
from PIL import Image
from servers import WAIT_S, chat, until

from squall import Model
from squall.errors import EngineStopped, InvalidRequest
from squall.server.options import ServerOptions

EDITS = "/v1/images/edits"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(keep_alive_s=0.05) as found:
        yield found


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG"
    return image


def png(colour: tuple[int, int, int] = (9, 8, 7)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(file, "PNG")
    return file.getvalue()


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def fails(response: httpx.Response, status: int, word: str) -> None:
    assert response.status_code == status, response.text
    assert word in response.json()["error"]["message"]


# ---- OpenAI's client ----


def test_openai_generates(client: openai.OpenAI) -> None:
    found = client.images.generate(
        model="gpt-image-1", prompt="a cat", n=3, size="64x32", response_format="b64_json",
        extra_body={"seed": 7, "steps": 2},
    )  # fmt: skip
    images = [opened(base64.b64decode(one.b64_json or "")) for one in found.data or []]
    assert [image.size for image in images] == [(64, 32)] * 3
    assert [image.getpixel((0, 0)) for image in images] == [(n, n, n) for n in (7, 8, 9)]
    assert abs(found.created - time.time()) < 60


def test_openai_gets_urls(client: openai.OpenAI, running: Running) -> None:
    found = client.images.generate(prompt="a cat", size="auto")
    (one,) = found.data or []
    assert one.url is not None
    assert one.url.startswith(f"{running.url}/images/")
    response = running.http.get(one.url)
    assert opened(response.content).size == (1280, 720)
    assert response.headers["content-type"] == "image/png"
    assert "max-age=3600" in response.headers["cache-control"]
    assert running.http.head(one.url).headers["content-length"] == str(len(response.content))


def test_openai_edits(client: openai.OpenAI, running: Running) -> None:
    found = client.images.edit(
        prompt="a dog", image=io.BytesIO(png()), n=2, size="32x32", response_format="b64_json",
        extra_body={"strength": "0.4", "seed": "3"},
    )  # fmt: skip
    images = [opened(base64.b64decode(one.b64_json or "")) for one in found.data or []]
    assert [image.getpixel((0, 0)) for image in images] == [(9, 8, 7)] * 2
    asked = running.brush.asked[-1]
    assert (asked.strength, asked.seed, asked.prompt) == (0.4, 4, "a dog")


def test_edits_in_json(running: Running) -> None:
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    for image in (url, [url], base64.b64encode(png()).decode()):
        response = running.post(EDITS, image=image, size="16x16", response_format="B64Json")
        (one,) = response.json()["data"]
        head, _, text = one["b64_json"].partition(",")
        assert head == "data:image/png;base64"
        assert opened(base64.b64decode(text)).getpixel((0, 0)) == (9, 8, 7)


def test_streams_tell_of_steps(running: Running) -> None:
    found = events(running.post(n=2, size="16x16", seed=5, stream=True).text)
    made = [event for event in found if event["type"] == "image_generation.completed"]
    assert [(event["index"], event["n"], event["seed"]) for event in made] == [(0, 2, 5), (1, 2, 6)]
    assert all(running.http.get(event["url"]).status_code == 200 for event in made)
    running.brush.go.clear()
    with httpx.stream(
        "POST", running.url + GENERATIONS, timeout=WAIT_S,
        json={"prompt": "slow", "size": "16x16", "stream": True, "steps": 3},
    ) as response:  # fmt: skip
        text = ""
        for part in response.iter_text():
            text += part
            if text.count("progress") and text.count("keep-alive") > 1:
                running.brush.go.set()
    steps = [event["step"] for event in events(text) if event["type"].endswith("progress")]
    assert steps == sorted(steps)
    assert steps


def test_notes_and_defaults(running: Running) -> None:
    (one,) = running.post(prompt="long", size="16x16").json()["data"]
    assert one["notes"] == ["CLIP read 77 tokens of 90"]
    response = running.post(size="16x16", quality="hd", style="vivid", user="me")
    assert response.status_code == 200
    assert response.headers["x-squall-ignored"] == "quality, style"
    asked = running.brush.asked[-1]
    assert (asked.steps, asked.guidance) == (None, None)


def test_models_and_metrics(running: Running) -> None:
    (card,) = running.http.get("/v1/models").json()["data"]
    assert (card["id"], card["object"]) == ("flux", "model")
    assert running.http.get("/v1/models/flux").json() == card
    before = running.model.stats().pictures
    running.post(size="16x16")
    text = running.http.get("/metrics").text
    assert f'squall_pictures_total{{model="flux"}} {before + 1}.0' in text
    assert 'squall_picture_seconds_total{model="flux",part="steps"}' in text
    assert running.http.get("/health").text == "OK"


# ---- what is refused ----


@pytest.mark.parametrize(("body", "word"), [
    ({"prompt": ""}, "prompt"), ({"prompt": "w " * 40}, "at most 32"), ({"prompt": None}, "prompt"),
    ({"n": 0}, "n is 0"), ({"n": 9}, "1 to 8"), ({"n": -1}, "n is -1"), ({"n": "2"}, "n: "),
    ({"size": "512"}, "1024x1024"), ({"size": "-16x16"}, "1024x1024"), ({"size": "17x16"}, "width"),
    ({"size": "0x16"}, "width"), ({"size": "99999x99999"}, "99999"), ({"size": "16x16 "}, "size"),
    ({"width": -16}, "width"), ({"height": 20}, "height"), ({"size": "16x16", "width": 16}, "size"),
    ({"steps": 0}, "steps"), ({"steps": 10**9}, "steps"), ({"seed": -1}, "seed"),
    ({"seed": 2**70}, "seed"), ({"guidance": -1}, "guidance"), ({"guidance": 1e9}, "guidance"),
    ({"response_format": "gif"}, "response_format"), ({"output_format": "jpeg"}, "output_format"),
    ({"prompt": "w" * 32_001}, "32001 characters"),
    ({"background": "transparent"}, "background"), ({"partial_images": 2}, "partial_images"),
])  # fmt: skip
def test_bad_requests(running: Running, body: dict[str, Any], word: str) -> None:
    fails(running.post(**body), 400, word)


@pytest.mark.parametrize(("body", "word"), [
    ({}, "image"), ({"image": "no image"}, "image"), ({"image": []}, "one"),
    ({"image": [""] * 2}, "one"), ({"image": "file:///etc/passwd"}, "image"),
    ({"image": "http://127.0.0.1:1/x.png"}, "127.0.0.1"), ({"image": 5}, "image"),
    ({"image": base64.b64encode(png()).decode(), "mask": "x"}, "mask"),
    ({"image": base64.b64encode(png()).decode(), "strength": 0}, "strength"),
    ({"image": base64.b64encode(png()[:40]).decode()}, "damaged"),
])  # fmt: skip
def test_bad_edits(running: Running, body: dict[str, Any], word: str) -> None:
    fails(running.post(EDITS, **body), 400, word)


def part(name: str, data: bytes, more: bytes = b"") -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="' + name.encode() + b'"'
    return head + more + b"\r\n\r\n" + data + b"\r\n"


CAT, FILE = part("prompt", b"cat"), b'; filename="a"'


@pytest.mark.parametrize(("parts", "word"), [
    (part("image", png(), FILE) + part("image", png(), FILE), "2 images"),
    (part("image[]", png(), FILE) * 2, "2 images"),
    # What was joined byte by byte, or once for each part, took minutes and gigabytes.
    (part("image", b"1" * 4_000_000, FILE) + part("image[]", b"1", FILE), "2 images"),
    (part("image[]", b"", FILE) * 50_000, "64 parts"),
    (part("user", b"") * 50_000, "64 parts"),
    (part("user", b"1" * 99_999), "65536 bytes"),
    (part("prompt", b"dog") + part("image", png(), FILE), "prompt"),
])  # fmt: skip
def test_forms_are_bounded(running: Running, parts: bytes, word: str) -> None:
    headers, since = {"content-type": "Multipart/Form-Data; boundary=x"}, time.monotonic()
    response = running.http.post(EDITS, content=CAT + parts + b"--x--\r\n", headers=headers)
    fails(response, 400, word)
    assert time.monotonic() - since < 3


def test_an_image_takes_no_more_than_its_picture() -> None:
    """However large it comes; and what was sent counts until the request is over."""
    file = io.BytesIO()
    Image.new("RGB", (4000, 3000), (9, 8, 7)).save(file, "PNG")
    form = {"data": {"prompt": "slow", "size": "32x16"}, "files": {"image": file.getvalue()}}
    with serving() as running:
        ask = threading.Thread(target=lambda: running.http.post(EDITS, timeout=WAIT_S, **form))
        ask.start()
        until(lambda: running.brush.asked)
        image = running.brush.asked[0].image
        assert image is not None
        assert image.shape == (16, 32, 3)
        assert running.server.service.bodies._held == len(file.getvalue())
        running.brush.go.set()
        ask.join()
        until(lambda: not running.server.service.bodies._held)


@pytest.mark.parametrize("data", [
    b"", b"--x", b"--x\r\n\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
    b"\x00" * 999, b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\ncat\r\n--x--\r\n',
    b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n' + b"1" * 99999 + b"\r\n--x--\r\n",
    b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\xff\r\n--x--\r\n',
    b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 999 + b"--x--\r\n",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data"])
def test_bad_forms(running: Running, data: bytes, kind: str) -> None:
    headers = {"content-type": kind}
    response = running.http.post(EDITS, content=data, headers=headers)
    assert response.status_code == 400, response.text


def test_what_goes_wrong_in_a_stream(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, however often the stream had looked."""
    # What is logged stays, and all that it refers to.
    monkeypatch.setattr("squall.server.errors.LOGGER.error", lambda *_, **__: None)
    monkeypatch.setattr("squall.server.pictures.POLL_S", 0.01)
    running.brush.go.clear()
    threading.Timer(0.3, running.brush.go.set).start()
    text = running.post(prompt="slow and broken", size="16x16", stream=True).text
    assert '"code": "internal_error"' in text
    until(lambda: not running.server.service.active)
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_what_went_wrong_inside_is_not_told(running: Running) -> None:
    response = running.post(prompt="broken")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert running.post(size="16x16").status_code == 200


def test_chats_are_for_other_models(running: Running) -> None:
    for name in ("flux", "default", "gpt-5"):
        response = running.http.post("/v1/chat/completions", json=chat() | {"model": name})
        fails(response, 400, "makes pictures")


# ---- cancelled, and too many ----


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(stream: bool) -> None:
    """Its picture ends at the next step, and what waited leaves the queue."""
    with serving() as running:
        body = {"prompt": "slow", "size": "16x16", "n": 3, "stream": stream}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(running.url + GENERATIONS, json=body, timeout=0.5)
        until(lambda: not running.model.busy and not running.model.waiting)
        assert len(running.brush.asked) == 1
        until(lambda: not running.server.service.active)
        assert running.post(size="16x16").status_code == 200


def test_all_pictures_of_a_request_or_none() -> None:
    with serving(max_queue=2) as running:
        first = threading.Thread(target=running.post, kwargs={"prompt": "slow", "size": "16x16"})
        first.start()
        until(lambda: running.model.busy)
        response = running.post(n=3, size="16x16")
        fails(response, 429, "wait")
        assert int(response.headers["retry-after"]) >= 1
        assert running.model.waiting == 0
        running.brush.go.set()
        first.join()
        assert len(running.brush.asked) == 1


def test_the_end_of_a_server() -> None:
    """What is being made is told so, and nothing stays on the disk."""
    with serving(drain_s=0.2) as running:
        url = running.post(size="16x16").json()["data"][0]["url"]
        (folder,) = {running.server.service.album._folder}
        assert folder is not None
        assert folder.is_dir()
        found: list[httpx.Response] = []
        slow = threading.Thread(target=lambda: found.append(running.post(prompt="slow")))
        slow.start()
        until(lambda: running.model.busy)
        running.server.service.draining = True
        slow.join(WAIT_S)
        assert found[0].status_code == 503
    assert not folder.exists()
    with pytest.raises(httpx.TransportError):
        httpx.get(url)


# ---- files ----


def test_files_end(tmp_path: Path) -> None:
    with serving(image_folder=tmp_path, image_age_s=0.4) as running:
        url = running.post(size="16x16").json()["data"][0]["url"]
        assert running.http.get(url).status_code == 200
        until(lambda: not list(tmp_path.iterdir()))
        fails(running.http.get(url), 404, "no longer")


def test_files_have_a_limit(tmp_path: Path) -> None:
    with serving(image_folder=tmp_path, image_bytes=200) as running:
        urls = [running.post(size="16x16").json()["data"][0]["url"] for _ in range(5)]
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 200
        assert running.http.get(urls[-1]).status_code == 200
        assert running.http.get(urls[0]).status_code == 404


def test_files_that_cannot_be_written_or_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _data: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with serving(image_folder=tmp_path / "new") as running:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            assert running.post(size="16x16").status_code == 500
        assert not list((tmp_path / "new").iterdir())
        url = running.post(size="16x16").json()["data"][0]["url"]
        (file,) = (tmp_path / "new").iterdir()
        file.unlink()
        fails(running.http.get(url), 404, "no longer")
        album = running.server.service.album
    with pytest.raises(EngineStopped):
        album.keep(b"late")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="no folder"):
        ServerOptions(image_folder=tmp_path / "file")


def test_names_are_all_that_is_served(tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(png())
    with serving(image_folder=tmp_path, api_keys=("key",)) as running:
        headers = {"authorization": "Bearer key"}
        response = httpx.post(
            running.url + GENERATIONS, json={"prompt": "x", "size": "16x16"}, headers=headers
        )
        url = response.json()["data"][0]["url"]
        assert running.http.get(url).status_code == 200  # the name is the key
        names = ("mine.png", "../mine.png", "%2e%2e%2fmine.png", "", ".", "a" * 5000)
        for name in names:
            status = running.http.get(f"/images/{name}").status_code
            assert status in (401, 404), name
        assert running.post().status_code == 401
    assert (tmp_path / "mine.png").exists()
    assert len(list(tmp_path.iterdir())) == 1


# ---- beside a model of text ----


def test_a_chat_and_a_picture(model: Model) -> None:
    with serving(model) as running:
        slow = threading.Thread(target=running.post, kwargs={"prompt": "slow", "size": "16x16"})
        slow.start()
        until(lambda: running.model.busy)
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
        for name in ("small", "default"):
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hi!"}], max_tokens=4
            )
            assert answer.choices[0].finish_reason == "length"
        assert running.model.busy
        assert [card.id for card in client.models.list().data] == ["small", "flux"]
        fails(running.post(model="small"), 400, "answers in text")
        response = running.http.post("/v1/chat/completions", json=chat() | {"model": "flux"})
        fails(response, 400, "makes pictures")
        text = running.http.get("/metrics").text
        assert 'squall_pictures_running{model="flux"} 1.0' in text
        assert 'squall_answers_total{end="finished",model="small"}' in text
        running.brush.go.set()
        slow.join()


def test_a_server_of_text_makes_no_pictures(http: httpx.Client) -> None:
    response = http.post(GENERATIONS, json={"prompt": "a cat"})
    fails(response, 400, "--image-model")
