"""Models that clients have downloaded, with Ollama's client, from a hub played by a server here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import ollama
import pytest
from random_models import write_random
from servers import Serving, connect, post_bytes, serving, until

from checkpoints import gguf_builder
from checkpoints.hub_server import Repository, Server, playing
from squall.cli.serve import ServeFlags
from squall.opening import Opening
from squall.server.residence import Lazy

NAME = "hf.co/o/tiny:Q8_0"
UNKNOWN = gguf_builder.File(
    [("general.architecture", gguf_builder.string("brand-new"))], [], b""
).to_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("models") / "one.gguf")


@pytest.fixture
def hub(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    files = {"tiny-Q8_0.gguf": path.read_bytes()}
    with playing({"o/tiny": files}, tmp_path, monkeypatch) as played:
        played.repositories["o/new"] = Repository({"new.gguf": UNKNOWN})
        yield played


@pytest.fixture
def running(hub: Server, path: Path) -> Iterator[Serving]:  # noqa: ARG001
    store = ServeFlags(allow_pull=True).options().store
    with serving({"one": Lazy("text", Opening(path))}, store=store) as found:
        yield found


@pytest.fixture
def llama(running: Serving) -> Iterator[ollama.Client]:
    with ollama.Client(host=running.url) as found:
        yield found


def test_from_pull_to_delete(llama: ollama.Client, running: Serving, path: Path) -> None:
    steps = [*llama.pull(NAME, stream=True)]
    assert (steps[0].status, steps[-1].status) == ("pulling manifest", "success")
    assert (steps[-2].completed, steps[-2].total) == (path.stat().st_size,) * 2
    assert (steps[-2].digest or "").startswith("sha256:")
    assert {one.model for one in llama.list().models} == {"one:latest", NAME}
    assert llama.show(NAME).capabilities == ["completion", "tools"]
    options = {"num_predict": 4, "temperature": 0}
    wanted = llama.generate("one", "Hi", options=options).response
    assert llama.generate(NAME, "Hi", options=options).response == wanted
    assert f'squall_model_loaded{{model="{NAME}"}} 1' in httpx.get(f"{running.url}/metrics").text
    assert llama.pull(NAME).status == "success"  # it is here
    standing = running.service.standing(NAME)
    assert isinstance(standing.lazy, Lazy)
    assert isinstance(standing.lazy.open, Opening)
    file = Path(standing.lazy.open.path or "")
    assert file.exists()
    assert llama.delete(NAME).status == "success"
    assert not file.exists()
    assert {one.model for one in llama.list().models} == {"one:latest"}
    for gone in (lambda: llama.delete(NAME), lambda: llama.show(NAME)):
        with pytest.raises(ollama.ResponseError, match="there is no model"):
            gone()
    assert llama.pull(NAME).status == "success"


@pytest.mark.parametrize(("name", "wrong"), [
    ("o/none", "has no model o/none"), ("o/new", "brand-new"), ("nothing", "no model of the hub"),
    ("/etc/passwd", "no model of the hub"), ("../x/y", "no model of the hub"),
])  # fmt: skip
def test_what_cannot_be_had(llama: ollama.Client, name: str, wrong: str) -> None:
    for stream in (True, False):
        with pytest.raises(ollama.ResponseError, match=wrong):
            [*llama.pull(name, stream=stream)]
    assert {one.model for one in llama.list().models} == {"one:latest"}


def test_it_must_be_allowed(path: Path) -> None:
    assert ServeFlags().options().store is None
    with (
        serving({"one": Lazy("text", Opening(path))}) as running,
        ollama.Client(running.url) as llama,
    ):
        asks: list[Callable[[], object]] = [
            lambda: llama.pull(NAME), lambda: [*llama.pull(NAME, stream=True)],
            lambda: llama.delete("one"),
        ]  # fmt: skip
        for ask in asks:
            with pytest.raises(ollama.ResponseError, match="started with --allow-pull") as raised:
                ask()
            assert raised.value.status_code == 403


def test_clients_remove_only_what_they_got(llama: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="'one' stays"):
        llama.delete("one")
    for name in (NAME, "o/tiny"):
        llama.pull(name)
    with pytest.raises(ollama.ResponseError, match="'o/tiny' has the same files"):
        llama.delete(NAME)
    assert llama.generate("o/tiny", "Hi", options={"num_predict": 2}).response


class Slow:
    """A store whose downloads take until they are cancelled, or `end` is set."""

    def __init__(self, path: Path) -> None:
        self.path, self.end, self.ended = path, threading.Event(), threading.Event()

    def pull(self, name: str, progress: Callable[[int, int], None]) -> Lazy:
        assert name
        try:
            while not self.end.wait(0.005):
                progress(5, 10)
        finally:
            self.ended.set()
        return Lazy("text", Opening(self.path))

    def remove(self, name: str) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("stream", [True, False])
def test_it_ends_when_the_client_goes(path: Path, stream: bool) -> None:
    store = Slow(path)
    with serving({"one": Lazy("text", Opening(path))}, store=store) as running:
        leaving = connect(running.port, post_bytes("/api/pull", {"model": "x", "stream": stream}))
        if stream:
            received = b""
            while b'"completed": 5' not in received:
                received += leaving.recv(1000)
        else:
            time.sleep(0.2)
        other = httpx.post(f"{running.url}/api/pull", json={"model": "y"})
        assert (other.status_code, "'x' is being downloaded" in other.text) == (429, True)
        assert not store.ended.is_set()
        leaving.close()
        until(lambda: store.ended.is_set() and running.service.active == 0)
        store.end.set()
        lines = httpx.post(f"{running.url}/api/pull", json={"model": "y"}).text.splitlines()
        assert json.loads(lines[-1]) == {"status": "success"}
        assert running.service.standing("y").name == "y"


def test_it_ends_with_the_server(path: Path) -> None:
    store = Slow(path)
    with serving({"one": Lazy("text", Opening(path))}, store=store, drain_s=0.1) as running:
        asking = connect(running.port, post_bytes("/api/pull", {"model": "x"}))
        assert asking.recv(1000)
    asking.close()
    assert store.ended.is_set()
