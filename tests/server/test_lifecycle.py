"""Rows 3, 25, 31, 34 and 39: a process that starts, is under load, and ends in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import httpx
import pytest
from random_models import write_random
from servers import (
    Process,
    Running,
    chat,
    connect,
    events,
    in_process,
    in_thread,
    post_bytes,
    read_until,
    until,
)  # fmt: skip

from squall import EngineConfig, Model
from squall.cli.serve import app
from squall.executors import Limits
from squall.program import Program

PATH = "/v1/chat/completions"
# The engine fails in its fourth step, or never ends it.
BROKEN = """
import sys, threading
from squall.engine.engine import Engine
from squall.cli import main
steps, step = [], Engine._step
def broken(self):
    steps.append(self)
    if len(steps) == 4:
        {what}
    step(self)
Engine._step = broken
sys.argv[0] = "squall"
main()
"""


# The machine has memory for the weights and 600 tokens of KV cache, or one CPU.
SMALL = """
import sys
from dataclasses import replace
from squall import assembly
from squall.cli import main
choose = assembly.choose_context
def chosen(wanted, *, loads, trained):
    loads[:] = [replace(load, free=load.weights + 600 * load.kv) for load in loads]
    return choose(wanted, loads=loads, trained=trained)
assembly.choose_context = chosen
sys.argv[0] = "squall"
main()
"""
ONE_CPU = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from squall.cli import main
sys.argv[0] = "squall"
main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random(tmp_path_factory.mktemp("models") / "tiny.gguf"))


def ask(server: Process, tokens: int, *, stream: bool = True) -> tuple[threading.Thread, list[str]]:
    """A thread that asks, and the response's text once it is there."""
    found: list[str] = []

    def run() -> None:
        body = chat("Tell a story.", max_tokens=tokens, stream=stream, ignore_eos=True)
        found.append(httpx.post(server.url + PATH, json=body, timeout=60).text)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def busy(server: Process, number: int) -> None:
    """Wait until so many answers are in the making."""
    wanted = re.compile(rf"squall_requests_running\{{.*\}} {number:.1f}")
    with httpx.Client(base_url=server.url) as client:
        until(lambda: bool(wanted.search(client.get("/metrics").text)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_row_39_running_answers_end(tmp_path: Path, tiny: str, number: signal.Signals) -> None:
    with in_process(tmp_path / "stderr", tiny) as server:
        # A connection that was open before is served as long as the process lives.
        with httpx.Client(base_url=server.url) as before:
            asked = [ask(server, 1500, stream=i % 2 == 0) for i in range(4)]
            busy(server, 4)
            server.process.send_signal(number)
            until(lambda: before.get("/health").status_code == 503)
            late = httpx.post(server.url + PATH, json=chat(max_tokens=1))
            assert late.status_code == 503
            assert "retry-after" in late.headers
            assert late.json()["error"]["code"] == "engine_stopped"
        for thread, _ in asked:
            thread.join()
        assert server.process.wait(10) == 0
    # An orderly end has nothing to say; the native module would, of memory that is left.
    assert "leaked" not in (tmp_path / "stderr").read_text()
    for i, (_, (text,)) in enumerate(asked):
        if i % 2:
            assert json.loads(text)["usage"]["completion_tokens"] == 1500
        else:
            *_, last, done = events(text)
            assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")


@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_row_39_patience_ends(tmp_path: Path, seconds: float) -> None:
    flags = ("--context", "8192", "--drain-timeout", str(seconds))
    with in_process(tmp_path / "stderr", *flags) as server:
        thread, found = ask(server, 8000)
        busy(server, 1)
        start_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start_s >= seconds
        thread.join()
    # Neither a reset nor an end that looks like a good one.
    assert "shutting down" in events(found[0])[-1]["error"]["message"]


def test_row_39_a_second_signal(tmp_path: Path) -> None:
    with in_process(tmp_path / "stderr", "--context", "8192") as server:
        body = chat("Tell a story.", max_tokens=8000, stream=True, ignore_eos=True)
        with connect(server.port, post_bytes(PATH, body)):
            busy(server, 1)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            assert server.stop() == 128 + signal.SIGTERM


def test_row_39_a_signal_while_loading(tmp_path: Path) -> None:
    """Also for the first process of a container, whom signals without a handler do not reach."""
    script = (
        "import os, signal, time\nfrom squall.model import Model\n"
        "def slow(*_, **__):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
        "Model.open_with = slow\nfrom squall.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", script, "serve", "--port", "0"]
    done = subprocess.run(command, capture_output=True, timeout=30, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("what", "flags"),
    [
        ("raise MemoryError('in the kernel')", ()),
        ("threading.Event().wait()", ("--stall-timeout", "1")),
    ],
)
def test_row_3_a_dead_engine(tmp_path: Path, tiny: str, what: str, flags: tuple[str, ...]) -> None:
    command = ("-c", BROKEN.format(what=what), "serve")
    flags = (tiny, "--max-seqs", "2", *flags)
    with in_process(tmp_path / "stderr", *flags, command=command) as server:
        asked = [ask(server, 200, stream=i % 2 == 0) for i in range(6)]
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 6)
        refused = httpx.post(server.url + PATH, json=chat(max_tokens=1))
        assert refused.status_code == 503
        for thread, _ in asked:
            thread.join()
        assert server.process.wait(15) == 1
    for _, (text,) in asked:
        last = json.loads(text) if text.startswith("{") else events(text)[-1]
        assert last["error"]["code"] == "engine_stopped"
        assert "kernel" not in text


# A step has 0.4 s, which others could take away: its tests are serial.
@pytest.fixture
def fragile() -> Iterator[Running]:
    with (
        Model.open(context=512, engine=EngineConfig(max_seqs=2)) as model,
        in_thread(model, stall_s=0.4) as found,
    ):
        yield found


@pytest.mark.serial
def test_row_3_a_stalled_engine_is_told_of(fragile: Running) -> None:
    fragile.held.hold()
    with connect(fragile.port, post_bytes(PATH, chat(max_tokens=5))) as connection:
        answer = read_until(connection, b"}}")
    assert b" 503 " in answer
    assert b"has not moved" in answer


@pytest.mark.serial
def test_row_3_an_idle_engine_is_not_stalled(fragile: Running) -> None:
    time.sleep(1.0)
    assert httpx.get(f"{fragile.url}/health").text == "OK"
    body = chat(max_tokens=100, ignore_eos=True)
    answer = httpx.post(fragile.url + PATH, json=body, timeout=30).json()
    assert answer["usage"]["completion_tokens"] == 100


@pytest.mark.serial
def test_row_3_everybody_hears_of_the_death(fragile: Running) -> None:
    fragile.held.hold()
    with ExitStack() as stack:
        body = post_bytes(PATH, chat(max_tokens=5))
        sockets = [stack.enter_context(connect(fragile.port, body)) for _ in range(5)]
        until(lambda: fragile.service.active == 5)
        until(lambda: fragile.model.engine.stats().waiting == 4)
        fragile.held.fail = ValueError("secret")
        fragile.held.let()
        for connection in sockets:
            answer = read_until(connection, b"}}")
            assert b" 503 " in answer
            assert b"secret" not in answer


def test_a_port_that_is_taken(server: Process, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "squall", "serve", "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot listen on 127.0.0.1 port")


def test_row_s4_nothing_else_is_listened_at(server: Process) -> None:
    process = Path("/proc", str(server.process.pid))
    own = {os.readlink(opened) for opened in (process / "fd").iterdir()}
    tables = [(process / "net" / name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for lines in tables for line in lines]
    listening = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
    assert listening == [f"0100007F:{server.port:04X}"]


def test_row_25_one_cpu_one_thread(tmp_path: Path) -> None:
    with in_process(tmp_path / "stderr", command=("-c", ONE_CPU, "serve")) as server:
        assert " 1 threads," in server.stderr()


def test_row_31_little_memory(tmp_path: Path) -> None:
    """It starts at its defaults, says with what context, and preempts when that is not enough."""

    def story(i: int) -> str:
        body = chat(f"Tell story {i}.", max_tokens=100, temperature=1, seed=i, ignore_eos=True)
        answer = httpx.post(server.url + PATH, json=body, timeout=60).json()
        text: str = answer["choices"][0]["message"]["content"]
        return text

    with in_process(tmp_path / "stderr", command=("-c", SMALL, "serve")) as server:
        assert "(context 300 tokens, KV cache 304, " in server.stderr()
        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(story, range(5)))
        metrics = httpx.get(f"{server.url}/metrics").text
        assert re.search(r"squall_preemptions_total\{.*\} [1-9]", metrics)
        assert found == list(map(story, range(5)))
        assert server.stop() == 0


class Stopped(Exception):
    """A model was about to be loaded, with so many tokens of context and of KV cache."""


@pytest.mark.parametrize(
    ("flags", "context", "tokens"),
    [
        ("--context 600 --max-seqs 4", 600, 2400),
        ("--kv-tokens 1000", 1000, 1008),
        # A token takes 22.5 KiB.
        ("--pa-gpu-mem 45 --pa-blk-size 32", 2048, 2048),
        ("--kv-memory 45 --kv-tokens 64", 64, 64),
        ("--kv-memory 45 --kv-dtype q8_0", 3640, 3648),
    ],
)
def test_row_31_sizes_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, flags: str, context: int, tokens: int
) -> None:
    def stop(program: Program, _: object, limits: Limits, **__: object) -> None:
        raise Stopped(program.context, limits.blocks * limits.block_size)

    monkeypatch.setattr("squall.executors.open", stop)
    monkeypatch.setattr("squall.cli.serve.signal.signal", lambda *_: None)
    with pytest.raises(Stopped) as found:
        app(["--port", "0", *flags.split()], standalone_mode=False)
    assert found.value.args == (context, tokens)


def test_row_34_a_burst_changes_nothing_for_others(tmp_path: Path) -> None:
    """Four times what may run and wait; the surplus is told when to come again."""
    body = chat("Tell a story.", max_tokens=300, temperature=1, seed=4, ignore_eos=True)

    def story(server: Process) -> str:
        text = httpx.post(server.url + PATH, json=body | {"stream": True}, timeout=60).text
        return "".join(e["choices"][0]["delta"].get("content", "") for e in events(text)[:-1])

    def short(server: Process) -> httpx.Response:
        return httpx.post(server.url + PATH, json=chat(max_tokens=2), timeout=60)

    flags = ("--max-seqs", "2", "--max-queue", "4")
    with in_process(tmp_path / "stderr", *flags) as server, ThreadPoolExecutor(32) as pool:
        alone = story(server)
        streams = [pool.submit(story, server) for _ in range(2)]
        busy(server, 2)
        others = [pool.submit(short, server) for _ in range(24)]
        first = [answer.result() for answer in islice(as_completed(others), 20)]
        assert not any(stream.done() for stream in streams)
        assert [answer.status_code for answer in first] == [429] * 20
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in first)
        assert sorted(answer.result().status_code for answer in others) == [200] * 4 + [429] * 20
        assert [stream.result() for stream in streams] == [alone] * 2
        assert httpx.get(f"{server.url}/health").text == "OK"
        assert server.stop() == 0
