"""Models that are loaded when they are asked for, and unloaded again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import servers
from adapter_files import write_adapter, write_base
from embedders import MadeUpEmbedder
from painters import GENERATIONS, Brush
from random_models import write_random
from servers import WAIT_S, chat, connect, events, post_bytes, read_until, until

from squall import EngineConfig, ImageModel, InvalidRequest, Model
from squall.opening import Opening
from squall.server.errors import ApiError
from squall.server.options import duration_s
from squall.server.residence import Lazy, Standing
from squall.server.run import Server

CHAT = "/v1/chat/completions"
SHORT: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@dataclass
class Opens:
    """Opens a small model, as often as it is called, and when it is let go."""

    path: Path
    go: threading.Event = field(default_factory=threading.Event)
    count: int = 0
    fails: Exception | None = None
    options: dict[str, Any] = field(default_factory=dict)
    models: list[Model] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.go.set()

    def __call__(self) -> Model:
        self.count += 1
        assert self.go.wait(WAIT_S)
        if self.fails is not None:
            raise self.fails
        engine = EngineConfig(max_seqs=2, max_queue=64)
        model = Model.open(self.path, **{"context": 256, "engine": engine} | self.options)
        self.models.append(model)
        return model


@dataclass
class Running:
    http: httpx.Client
    port: int
    server: Server

    def standing(self, name: str) -> Standing[Any]:
        return self.server.service.standing(name)

    def state(self, name: str) -> str:
        found: str = self.http.get(f"/v1/models/{name}").json()["state"]
        return found

    def chat(self, text: str = "The sea is", **fields: Any) -> httpx.Response:
        return self.http.post(CHAT, json=chat(text, **SHORT | fields))

    def call(self, function: Callable[[], Any]) -> None:
        """On the event loop."""
        self.server.servers[0].get_loop().call_soon_threadsafe(function)


@contextmanager
def serving(models: dict[str, Any], **options: Any) -> Iterator[Running]:
    with (
        servers.serving(models, **options) as found,
        httpx.Client(base_url=found.url, timeout=WAIT_S) as http,
    ):
        yield Running(http, found.port, found.server)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("models") / "one.gguf")


@pytest.fixture
def opens(path: Path) -> Opens:
    return Opens(path)


def test_it_is_loaded_when_it_is_asked_for(opens: Opens, path: Path) -> None:
    with serving({"one": Lazy("text", opens), "two": Lazy("text", Opening(path))}) as running:
        listed = running.http.get("/v1/models").json()["data"]
        assert [(m["id"], m["kind"], m["state"], m["pinned"]) for m in listed] == [
            ("one", "text", "unloaded", False),
            ("two", "text", "unloaded", False),
        ]
        assert opens.count == 0
        assert running.http.get("/health").text == "OK"
        assert running.chat(model="one").json()["usage"]["completion_tokens"] == 4
        assert (opens.count, running.state("one"), running.state("two")) == (
            1,
            "loaded",
            "unloaded",
        )
        assert running.http.get("/v1/models/one").json()["max_model_len"] == 256
        told = running.http.post("/tokenize", json={"prompt": "Hi", "model": "one"}).json()
        assert (told["count"], opens.count) == (2, 1)
    assert opens.models[0]._engine is None  # who opened it has closed it


def test_twenty_first_calls_load_it_once(opens: Opens) -> None:
    opens.go.clear()
    with serving({"one": Lazy("text", opens)}) as running, ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(running.chat, model="one") for _ in range(20)]
        until(lambda: len(running.standing("one").waiting) == 20)
        assert running.state("one") == "loading"
        opens.go.set()
        texts = {found.result().json()["choices"][0]["message"]["content"] for found in asked}
        assert (len(texts), opens.count) == (1, 1)
        until(lambda: not running.standing("one").users)


@pytest.mark.parametrize("url", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_stream_is_told_while_it_loads(opens: Opens, url: str) -> None:
    opens.go.clear()
    body = {"model": "one", "stream": True, "max_tokens": 4}
    asked = {"/v1/completions": {"prompt": "Hi"}, "/v1/responses": {"input": "Hi"}}
    body |= asked.get(url) or chat()
    with serving({"one": Lazy("text", opens)}, keep_alive_s=0.05) as running:
        silence = b"ping" if url == "/v1/messages" else b": keep-alive"
        with connect(running.port, post_bytes(url, body)) as waiting:
            begun = read_until(waiting, silence)
            assert b" 200 " in begun
            opens.go.set()
            rest = read_until(waiting, b"\r\n0\r\n")
        assert events((begun + rest).decode().replace("\r", ""))


def test_a_failed_load_is_told_to_all_and_tried_again(opens: Opens) -> None:
    opens.go.clear()
    opens.fails = InvalidRequest("the file is broken")
    options = {"keep_alive_s": 0.05}
    with serving({"one": Lazy("text", opens)}, **options) as running, ThreadPoolExecutor() as pool:
        asked = [pool.submit(running.chat, model="one", stream=i == 2) for i in range(3)]
        until(lambda: len(running.standing("one").waiting) == 3)
        time.sleep(0.2)
        opens.go.set()
        first, second, stream = (found.result() for found in asked)
        why = "the model 'one' could not be loaded: the file is broken"
        assert {(f.status_code, f.json()["error"]["message"]) for f in (first, second)} == {
            (400, why)
        }
        assert events(stream.text)[-1]["error"]["message"] == why
        card = running.http.get("/v1/models/one").json()
        assert (card["state"], card["error"], opens.count) == ("failed", why, 1)
        opens.fails = None
        assert running.chat(model="one").status_code == 200
        assert (running.state("one"), opens.count) == ("loaded", 2)


def test_a_client_that_leaves_takes_nobody_along(opens: Opens) -> None:
    opens.go.clear()
    with serving({"one": Lazy("text", opens)}) as running, ThreadPoolExecutor() as pool:
        leaving = connect(running.port, post_bytes(CHAT, chat(model="one", **SHORT)))
        staying = pool.submit(running.chat, model="one")
        until(lambda: len(running.standing("one").waiting) == 2)
        leaving.close()
        until(lambda: len(running.standing("one").waiting) == 1)
        assert running.server.service.active == 1
        opens.go.set()
        assert staying.result().status_code == 200
        until(lambda: not running.standing("one").users)


@pytest.mark.parametrize("keep_s", [0.0, 0.2])
def test_it_is_unloaded_when_it_was_idle(opens: Opens, keep_s: float) -> None:
    with serving({"one": Lazy("text", opens, keep_alive_s=keep_s)}) as running:
        for number in (1, 2):
            assert running.chat(model="one").status_code == 200
            assert opens.count == number
            until(lambda: running.standing("one").state == "unloaded")
        until(lambda: all(model._engine is None for model in opens.models))


def test_the_keep_alive_can_be_changed(opens: Opens) -> None:
    with serving({"one": Lazy("text", opens)}) as running:
        running.chat(model="one")
        residence, one = running.server.service.residence, running.standing("one")
        running.call(lambda: residence.keep(one, 3600))
        running.call(lambda: residence.keep(one, None))
        time.sleep(0.1)
        assert running.state("one") == "loaded"
        running.call(lambda: residence.keep(one, 0))
        until(lambda: running.standing("one").state == "unloaded")


def test_ollamas_keep_alive_holds_for_a_model_that_is_idle(opens: Opens) -> None:
    models = {"one": Lazy("text", opens, keep_alive_s=60), "two": Lazy("text", opens)}
    with serving(models) as running:
        generate = {"model": "one", "keep_alive": "1h"}
        for keep, seconds in (("1h", 3600), (-1, None), ("0.05s", 0.05)):
            running.http.post("/api/generate", json=generate | {"keep_alive": keep})
            timer, now_s = running.standing("one").timer, time.monotonic()
            if seconds is None:
                assert timer is None
            elif seconds > 1:
                assert timer is not None
                assert timer.when() - now_s == pytest.approx(seconds, abs=9)
        until(lambda: running.standing("one").state == "unloaded")
        assert opens.count == 1


def test_what_is_used_while_its_unloading_waits_stays(opens: Opens, path: Path) -> None:
    """Its time was over while another model was loaded, and then somebody used it."""
    other = Opens(path)
    models = {"one": Lazy("text", opens), "two": Lazy("text", other)}
    with serving(models) as running, ThreadPoolExecutor() as pool:
        running.chat(model="one")
        other.go.clear()
        asked = pool.submit(running.chat, model="two")
        until(lambda: other.count == 1)
        for keep_alive_s in (0.05, 60):
            running.standing("one").keep_alive_s = keep_alive_s
            running.chat(model="one")
            time.sleep(0.3)
        other.go.set()
        assert asked.result().status_code == 200
        running.http.post("/v1/models/two/unload")
        assert (running.state("one"), opens.count) == ("loaded", 1)


def test_what_nobody_waits_for_any_more_is_not_loaded(opens: Opens, path: Path) -> None:
    other = Opens(path)
    other.go.clear()
    models = {"one": Lazy("text", opens), "two": Lazy("text", other)}
    with serving(models) as running, ThreadPoolExecutor() as pool:
        asked = pool.submit(running.chat, model="two")
        until(lambda: other.count == 1)
        leaving = connect(running.port, post_bytes(CHAT, chat(model="one", **SHORT)))
        until(lambda: len(running.standing("one").waiting) == 1)
        leaving.close()
        until(lambda: not running.standing("one").waiting)
        other.go.set()
        assert asked.result().status_code == 200
        running.http.post("/v1/models/two/unload")
        assert (running.state("one"), opens.count) == ("unloaded", 0)


def test_load_and_unload(opens: Opens, path: Path) -> None:
    stays = Opening(path)
    models = {"a/b": Lazy("text", opens), "stays": Lazy("text", stays, pinned=True)}
    with serving(models) as running:
        http = running.http
        assert http.post("/v1/models/a/b/load").json()["state"] == "loaded"
        assert http.post("/v1/models/a/b/load").json()["state"] == "loaded"
        assert opens.count == 1
        assert http.post("/v1/models/a/b/unload").json()["state"] == "unloaded"
        assert http.post("/v1/models/a/b/unload").json()["state"] == "unloaded"
        assert http.post("/v1/models/stays/load").json()["pinned"] is True
        refused = http.post("/v1/models/stays/unload")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_pinned")
        assert http.post("/v1/models/c/load").status_code == 404
        wrong = http.post("/v1/models/a/b/unload", params={"wait": "soon"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "wait")


def test_what_is_in_use_is_not_unloaded(opens: Opens) -> None:
    with serving({"one": Lazy("text", opens)}) as running, ThreadPoolExecutor() as pool:
        unload, story = "/v1/models/one/unload", {"max_tokens": 100}
        asked = pool.submit(running.chat, model="one", **story)
        until(lambda: running.standing("one").state == "loaded")
        refused = running.http.post(unload)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
        waited = pool.submit(running.http.post, unload, params={"wait": True})
        until(lambda: running.standing("one").leaving)
        late = pool.submit(running.chat, model="one")  # waits, and loads it again
        assert asked.result().json()["usage"]["completion_tokens"] == 100
        assert waited.result().status_code == 200
        assert late.result().status_code == 200
        assert opens.count == 2


def test_an_end_while_it_loads(opens: Opens) -> None:
    opens.go.clear()
    with serving({"one": Lazy("text", opens)}) as running, ThreadPoolExecutor() as pool:
        whole, stream = (pool.submit(running.chat, model="one", stream=s) for s in (False, True))
        until(lambda: len(running.standing("one").waiting) == 2)
        running.server.service.draining = True
        assert whole.result().status_code == 503
        assert "shutting down" in whole.result().json()["error"]["message"]
        assert "shutting down" in stream.result().text
        opens.go.set()


def test_an_end_while_it_is_to_make_room(opens: Opens) -> None:
    """What runs may end; who waits until it is loaded again is told."""
    opens.options = {"context": 2048}
    with serving({"one": Lazy("text", opens)}) as running, ThreadPoolExecutor() as pool:
        asked = pool.submit(running.chat, model="one", max_tokens=1000)
        until(lambda: running.standing("one").state == "loaded")
        pool.submit(running.http.post, "/v1/models/one/unload", params={"wait": True})
        until(lambda: running.standing("one").leaving)
        late = pool.submit(running.chat, model="one")
        until(lambda: bool(running.standing("one").waiting))
        assert running.standing("one").users
        running.server.service.draining = True
        assert asked.result().json()["usage"]["completion_tokens"] == 1000
        assert late.result().status_code == 503
        assert opens.count == 1


def test_an_end_while_texts_are_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squall.server.run.LAST_BYTES_S", 0.0)
    embedder = MadeUpEmbedder()
    embedder.go.clear()
    with serving({"words": embedder}) as running, ThreadPoolExecutor() as pool:
        asked = pool.submit(running.http.post, "/v1/embeddings", json={"input": "Hi"})
        running.server.config.timeout_graceful_shutdown = 0
        until(lambda: bool(running.standing("words").users))
        time.sleep(0.1)
        running.server.service.draining = True
        time.sleep(0.3)
        embedder.go.set()
        assert asked.result().status_code == 200


def test_a_model_that_makes_pictures(path: Path) -> None:
    brushes: list[Brush] = []

    def paint() -> ImageModel:
        brushes.append(Brush())
        return ImageModel(brushes[-1], path=Path("flux"))  # type: ignore[arg-type]

    models = {"flux": Lazy("pictures", paint, keep_alive_s=0.1), "one": Lazy("text", Opening(path))}
    with serving(models) as running:
        for number in (1, 2):
            found = running.http.post(GENERATIONS, json={"prompt": "a cat", "size": "64x64"})
            assert (found.status_code, len(brushes)) == (200, number)
            until(lambda: running.standing("flux").state == "unloaded")
        assert running.state("one") == "unloaded"
        wrong = running.chat(model="flux")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "wrong_model")


def test_a_model_of_embeddings(path: Path) -> None:
    class Embedder:
        formats, path, context, width, reranks = (), Path("words"), 8, 8, False

        def close(self) -> None:
            pass

    with serving(
        {"words": Lazy("embeddings", Embedder), "one": Lazy("text", Opening(path))}
    ) as running:
        service = running.server.service
        for name in ("words", None, "text-embedding-3-small"):
            assert service.embedder(name).name == "words"
        with pytest.raises(ApiError, match="'one' answers in text; those that make embeddings"):
            service.embedder("one")
        assert running.http.post("/v1/models/words/load").json()["kind"] == "embeddings"
        assert isinstance(service.embedder("words").model, Embedder)
        with pytest.raises(ApiError, match="'words' makes embeddings, not text"):
            service.find("words")


def test_metrics_while_models_come_and_go(opens: Opens, path: Path) -> None:
    with serving({"one": Lazy("text", opens), "two": Lazy("text", Opening(path))}) as running:
        assert running.http.get("/metrics").status_code == 200
        running.chat(model="one")
        assert 'squall_answer_tokens_total{model="one"} 4' in running.http.get("/metrics").text
        running.http.post("/v1/models/one/unload")
        assert "squall_answer_tokens_total{" not in running.http.get("/metrics").text


def test_adapters_are_there_again(tmp_path: Path) -> None:
    """Those of its opening, those that clients loaded or removed, and which are active."""
    write_base(tmp_path / "base")
    for seed, name in enumerate(("mine", "yours", "gone")):
        write_adapter(tmp_path / name, seed)
    adapters = {name: tmp_path / name for name in ("mine", "gone")}
    opening = Opening(tmp_path / "base", context=512, threads=1, adapters=adapters)
    models = {"one": Lazy("text", opening), "two": Lazy("text", Opening(tmp_path / "base"))}
    fields = {"max_tokens": 12}
    with serving(models, adapter_folders=(tmp_path,)) as running:
        http = running.http

        def names() -> set[str]:
            return {m["id"] for m in http.get("/v1/models").json()["data"] if m["parent"] == "one"}

        def answers() -> list[str]:
            asked = [running.chat(model=name, **fields) for name in ("mine", "yours", "one")]
            return [found.json()["choices"][0]["message"]["content"] for found in asked]

        assert names() == {"mine", "gone"}
        for other in ("one", "two"):
            http.post(f"/v1/models/{other}/unload")
            http.post("/v1/models/two/load")
            refused = http.delete("/v1/adapters/gone")
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_loaded")
        assert http.delete("/v1/adapters/nobody").status_code == 404
        http.post("/v1/adapters", json={"model": "one", "name": "yours", "path": "yours"})
        http.delete("/v1/adapters/gone")
        http.post("/activate_adapters", json={"model": "one", "adapter_names": ["yours"]})
        assert running.state("one") == "loaded"
        before = answers()
        assert before[1] == before[2] != before[0]
        http.post("/v1/models/one/unload")
        assert names() == {"mine", "yours"}
        assert answers() == before
        assert names() == {"mine", "yours"}
        assert running.standing("one").loads == 2


def test_weights_that_were_quantized_are_so_again(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    models = {n: Lazy("text", Opening(tmp_path / "base", context=512)) for n in ("one", "two")}
    with serving(models) as running:
        running.http.post("/re_isq", json={"model": "one", "ggml_type": "Q8_0"})
        formats = running.standing("one").model.weight_formats
        assert "q8_0" in {total.format for total in formats}
        running.http.post("/v1/models/one/unload")
        running.http.post("/v1/models/one/load")
        assert running.standing("one").model.weight_formats == formats


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("100ms", 0.1), (300, 300), ("300", 300),
        (0, 0), ("0", 0), (-1, None), ("-1", None), ("-1m", None), (2.5, 2.5), ("0s", 0),
        ("99999999h", None), (1e300, None), (-1e300, None), (1e-5, 1e-5),
    ],
)  # fmt: skip
def test_times(given: str | float, seconds: float | None) -> None:
    assert duration_s(given) == pytest.approx(seconds)


@pytest.mark.parametrize("given", [
    "", "5 minutes", "m", "5 m", "5d", "1e3", "-", "5m-", "1m5", True, "\u0665m", "9" * 400,
    "1" * 999 + "s", "nan", float("nan"),
])  # fmt: skip
def test_what_is_no_time(given: str | float) -> None:
    with pytest.raises(InvalidRequest, match="is no time"):
        duration_s(given)
