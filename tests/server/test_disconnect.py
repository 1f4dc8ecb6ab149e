"""Rows 1 and 2: who goes away costs nothing any more, and nobody else notices."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from invariants import check_scheduler
from servers import Process, Running, chat, connect, in_thread, post_bytes, read_until, until

from squall import Model

PATH = "/v1/chat/completions"
LONG = "The quick brown fox jumps over the lazy dog. " * 70
SOCKETS = 20


@pytest.fixture
def running(model: Model) -> Iterator[Running]:
    with in_thread(model, keep_alive_s=0.05) as found:
        yield found


def known(running: Running) -> int:
    now = running.model.engine.stats()
    return now.running + now.waiting


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_row_1_a_client_that_leaves(running: Running, phase: str, stream: bool) -> None:
    text = LONG if phase == "prefill" else "Hi!"
    body = chat(text, max_tokens=500, stream=stream, ignore_eos=True, n=1)
    running.held.hold()
    ahead = []
    if phase == "queued":
        ahead = [connect(running.port, post_bytes(PATH, chat(max_tokens=3))) for _ in range(2)]
        until(lambda: known(running) == 2)
    leaving = connect(running.port, post_bytes(PATH, body))
    if phase == "queued":
        until(lambda: known(running) == 3)
    else:
        until(lambda: known(running) == 1)
        before = running.held.steps
        running.held.let(4 if phase == "decode" else 0)
        until(lambda: running.held.steps == before + (4 if phase == "decode" else 0))
    before = running.held.steps
    leaving.close()
    until(lambda: running.service.active == len(ahead))
    running.held.let()
    for connection in ahead:
        # Row 2: the others end as if nothing had been.
        assert b'"finish_reason":"length"' in read_until(connection, b"usage")
        connection.close()
    until(running.quiet, 2)
    if not ahead:
        assert running.held.steps - before <= 1


@pytest.mark.parametrize("stream", [True, False])
def test_row_1_many_that_leave(running: Running, stream: bool) -> None:
    body = post_bytes(PATH, chat(LONG, max_tokens=500, stream=stream, ignore_eos=True))
    for _ in range(SOCKETS // 4):
        sockets = [connect(running.port, body) for _ in range(4)]
        until(lambda: known(running) == 4)
        for connection in sockets:
            connection.close()
        until(running.quiet, 3)
    check_scheduler(running.model.engine._scheduler)


def test_row_1_a_client_that_leaves_before_its_job_is_there(running: Running) -> None:
    """While the threads that tokenize are busy with others."""
    free = threading.Event()
    blocking = [running.service.submit(free.wait) for _ in range(8)]
    leaving = connect(running.port, post_bytes(PATH, chat(max_tokens=500)))
    until(lambda: running.service.active == 1)
    leaving.close()
    free.set()
    assert all(future.result() for future in blocking)
    until(running.quiet, 3)


def test_row_2_cancelling_one_does_not_change_another(running: Running) -> None:
    body = chat("Tell a story.", max_tokens=60, temperature=1, seed=1, ignore_eos=True)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        alone = client.post(PATH, json=body).json()["choices"]
        found = []
        thread = threading.Thread(target=lambda: found.append(client.post(PATH, json=body).json()))
        thread.start()
        while thread.is_alive():
            other = connect(running.port, post_bytes(PATH, chat("Something else", stream=True)))
            time.sleep(0.01)
            other.close()
        thread.join()
    assert found[0]["choices"] == alone
    until(running.quiet, 3)


def test_row_1_a_client_that_is_killed(server: Process, http: httpx.Client) -> None:
    script = (
        "import httpx\n"
        f"with httpx.stream('POST', '{server.url}{PATH}', timeout=60, json={{'messages': 'Hi', "
        "'max_tokens': 1900, 'ignore_eos': True, 'stream': True}) as response:\n"
        "    for line in response.iter_lines():\n"
        "        print(line, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline().startswith(b"data: ")
        client.kill()
    until(lambda: 'squall_requests_running{model="small"} 0.0' in http.get("/metrics").text, 3)


def test_row_34_silent_streams_get_comments(running: Running) -> None:
    running.held.hold()
    with connect(running.port, post_bytes(PATH, chat(max_tokens=2, stream=True))) as connection:
        assert b": keep-alive\n\n" in read_until(connection, b": keep-alive\n\n")
        running.held.let()
        assert b"data: [DONE]\n\n" in read_until(connection, b"data: [DONE]\n\n")
