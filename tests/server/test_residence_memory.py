"""Several models, larger together than the memory that they may have."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from random_models import write_random
from servers import until
from test_residence import Running, serving

from squall import EngineConfig, InvalidRequest, Model
from squall.needs import needs
from squall.opening import Opening
from squall.server.residence import Lazy

MIB = 1 << 20
ASKED: dict[str, Any] = {"max_tokens": 12, "temperature": 1, "seed": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models that each take a few MiB."""
    folder = tmp_path_factory.mktemp("models")
    names = {"one": 1, "two": 2}
    return {n: write_random(folder / f"{n}.gguf", s, hidden=128) for n, s in names.items()}


def opening(path: Path, **options: Any) -> Opening:
    return Opening(path, context=256, threads=1, engine=EngineConfig(max_seqs=2), **options)


def size(path: Path) -> int:
    return needs("text", opening(path), 1 << 40).bytes


def lazy(files: dict[str, Path], **fields: Any) -> dict[str, Lazy]:
    return {name: Lazy("text", opening(path), **fields) for name, path in files.items()}


def texts(running: Running, rounds: int) -> list[tuple[str, str]]:
    """Answers of one after the other model."""
    found = []
    for number in range(rounds):
        for name in ("one", "two"):
            answer = running.chat(f"Story {number}", model=name, **ASKED)
            assert answer.status_code == 200, answer.text
            found.append((name, answer.json()["choices"][0]["message"]["content"]))
    return found


@pytest.mark.slow("loads a model fifty times")
def test_they_take_turns_and_answer_as_fresh_ones(files: dict[str, Path]) -> None:
    limit = size(files["one"]) + size(files["two"]) // 2
    with serving(lazy(files), memory_bytes=limit) as running:
        found = texts(running, 25)
        loads = [running.standing(name).loads for name in files]
        assert loads == [25, 25]
        assert [running.state(name) for name in files] == ["unloaded", "loaded"]
    for which, (name, path) in enumerate(files.items()):
        for number in (0, 24):
            with Model.open_with(opening(path)) as model, serving({name: model}) as fresh:
                answer = fresh.chat(f"Story {number}", **ASKED).json()
            text = answer["choices"][0]["message"]["content"]
            assert found[2 * number + which] == (name, text)


def test_both_stay_where_both_fit(files: dict[str, Path]) -> None:
    limit = 2 * (size(files["one"]) + size(files["two"]))
    with serving(lazy(files), memory_bytes=limit) as running:
        texts(running, 3)
        assert [running.standing(name).loads for name in files] == [1, 1]
        held = [running.standing(name).nbytes for name in files]
        assert sum(held) <= limit
        metrics = running.http.get("/metrics").text
        assert 'squall_model_loaded{model="one"} 1.0' in metrics
        told = re.search(r'squall_model_bytes\{model="two"\} (.+)', metrics)
        assert told is not None
        assert float(told[1]) == held[1]


def test_requests_that_run_are_waited_for(files: dict[str, Path]) -> None:
    limit = size(files["one"]) + size(files["two"]) // 2
    with serving(lazy(files), memory_bytes=limit) as running, ThreadPoolExecutor() as pool:
        long = {"max_tokens": 150, "temperature": 0, "ignore_eos": True}
        first = pool.submit(running.chat, model="one", **long)
        until(lambda: running.standing("one").state == "loaded")
        others = [pool.submit(running.chat, model=name) for name in ("two", "one") * 5]
        assert first.result().json()["usage"]["completion_tokens"] == 150
        assert [found.result().status_code for found in others] == [200] * 10


def test_what_can_never_fit_unloads_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    large = write_random(tmp_path / "large.gguf", hidden=512)
    models = lazy(files) | {"large": Lazy("text", opening(large))}
    limit = size(files["one"]) + size(files["two"]) + MIB  # for KV caches of two contexts each
    with serving(models, memory_bytes=limit) as running:
        texts(running, 1)
        refused = running.chat(model="large")
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "out_of_memory")
        assert error["message"].startswith("the model 'large' could not be loaded: it takes about")
        assert "--memory-limit" in error["message"]
        assert [running.state(name) for name in models] == ["loaded", "loaded", "failed"]


def test_a_draft_model_is_counted_too(files: dict[str, Path], tmp_path: Path) -> None:
    """Beside a KV cache that is larger than it must be."""
    draft = write_random(tmp_path / "draft.gguf", hidden=256)
    pair = opening(files["one"], draft=Opening(draft))
    with serving({"one": Lazy("text", pair), "two": Lazy("text", pair)}) as running:
        running.http.post("/v1/models/one/load")
        one = running.standing("one")
        cache = one.model.executor.kv_bytes
        assert one.nbytes >= needs("text", pair, 1 << 40).weights + cache
        assert one.nbytes > size(files["one"]) + draft.stat().st_size


def test_pinned_ones_stay(files: dict[str, Path]) -> None:
    models = lazy(files) | {"one": Lazy("text", opening(files["one"]), pinned=True)}
    limit = size(files["one"]) + size(files["two"]) // 2
    with serving(models, memory_bytes=limit) as running:
        assert running.state("one") == "loaded"  # from the start
        refused = running.chat(model="two")
        assert refused.status_code == 503
        assert "'one' stays with" in refused.json()["error"]["message"]
        assert running.chat(model="one").status_code == 200


def test_a_pinned_one_that_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    from squall.server.options import ServerOptions
    from squall.server.run import listen, make_server

    server = make_server({"b": Lazy("text", Opening(broken), pinned=True)}, ServerOptions())
    with listen("127.0.0.1", 0) as listener, pytest.raises(InvalidRequest, match="'b' could not"):
        server.run(sockets=[listener])


def test_the_kv_cache_leaves_room_for_others(files: dict[str, Path]) -> None:
    """What they may hold together is within the limit, however much each would like."""
    engine = EngineConfig(max_seqs=64)
    models = {n: Lazy("text", Opening(p, context=256, engine=engine)) for n, p in files.items()}
    limit = 2 * (size(files["one"]) + 8 * MIB)
    with serving(models, memory_bytes=limit) as running:
        texts(running, 2)
        assert [running.standing(name).loads for name in files] == [1, 1]
        assert sum(running.standing(name).nbytes for name in files) <= limit


GIVES_BACK = """
import asyncio, re, sys
from squall.server.app import create_app, service_of
from squall.server.residence import Lazy
from squall.opening import Opening
from starlette.testclient import TestClient

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

body = {"messages": "Say hello. " * 50, "max_tokens": 30, "ignore_eos": True}
app = create_app({"one": Lazy("text", Opening(context=1024)), "two": Lazy("text", Opening())})
with TestClient(app) as client:
    def used(name):
        assert client.post("/v1/chat/completions", json=body | {"model": name}).status_code == 200
        loaded = held()
        assert client.post(f"/v1/models/{name}/unload").status_code == 200
        return loaded, held()
    used("one")  # modules and caches are there from now on
    _, before = used("two")
    for name in ("one", "two", "one"):
        loaded, after = used(name)
        print(before, loaded, after)
        assert loaded - before > 100_000
        assert loaded - after >= 0.95 * (loaded - before)
        before = after
"""


@pytest.mark.slow("a process that loads a real model five times")
def test_unloading_gives_memory_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVES_BACK], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
