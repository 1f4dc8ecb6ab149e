"""Too many, too slow, too large: refused soon, and with a word when to come again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace

import httpx
import pytest
from servers import Running, chat, connect, in_thread, post_bytes, read_until, until

from squall import Model
from squall.server.service import SLACK

PATH = "/v1/chat/completions"
QUICK_S = 0.3

pytestmark = pytest.mark.serial  # another process could keep us from being as quick


@pytest.fixture(scope="module")
def running(model: Model) -> Iterator[Running]:
    quick = {"header_s": QUICK_S, "body_s": QUICK_S, "write_s": QUICK_S}
    with in_thread(model, body_bytes=2**20, all_bodies_bytes=3 * 2**19, **quick) as found:
        yield found


def test_row_34_a_burst(running: Running) -> None:
    """Two run and four wait; the others hear at once when to come again."""
    running.held.hold()
    body = post_bytes(PATH, chat(max_tokens=2, stream=True))
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(running.port, body)) for _ in range(24)]
        # Nothing runs, and still the others have their answer.
        until(lambda: running.service.active == 6)
        running.held.let()
        found = [read_until(connection, b"}") for connection in sockets]
    refused = [answer for answer in found if b" 429 " in answer.split(b"\r\n")[0]]
    assert len(refused) == 18
    assert all(b"retry-after: " in answer for answer in refused)
    assert all(b" 200 " in a.split(b"\r\n")[0] for a in found if a not in refused)
    until(running.quiet)


def test_row_34_too_many_to_read_from(running: Running) -> None:
    """Who could not be queued anyway is refused before the body is read."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n".encode()
    most = SLACK + sum(standing.most for standing in running.service.all)
    running.service.active += most
    with connect(running.port, head) as connection:
        answer = read_until(connection, b"}}")
    running.service.active -= most
    assert b" 429 " in answer
    assert b"retry-after: 1" in answer


@pytest.mark.parametrize(
    "data", [b"", b"\r\n\r\n", b"GET /health", b"GET /health HTTP/1.1\r\nHost: x\r\nA:"]
)
def test_slow_headers(running: Running, data: bytes) -> None:
    with connect(running.port, data) as connection:
        assert read_until(connection, b"never") == b""


def test_a_header_a_byte_at_a_time(running: Running) -> None:
    with connect(running.port) as connection:
        start_s = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() < start_s + 20 * QUICK_S:
                connection.sendall(b"G")
                time.sleep(QUICK_S / 10)
            pytest.fail("it was read for too long")


@pytest.mark.parametrize("part", [b"x" * 70_000, b"A: b\r\n" * 12_000])
def test_a_large_header(running: Running, part: bytes) -> None:
    with connect(running.port, b"GET / HTTP/1.1\r\nHost: x\r\nX: ") as connection:
        connection.sendall(part)
        assert b" 400 " in read_until(connection, b"too large.")


def test_requests_behind_one_that_takes_long(running: Running) -> None:
    """Some may wait in a connection; who sends more and more loses it."""
    ask = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    last = ask.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    running.held.hold()
    with connect(running.port, post_bytes(PATH, chat(max_tokens=1)) + ask + last) as connection:
        until(lambda: running.service.active == 1)
        running.held.let()
        assert read_until(connection, b"never").count(b" 200 ") == 3
    running.held.hold()
    with connect(running.port, post_bytes(PATH, chat(max_tokens=1)) + 50 * ask) as connection:
        assert read_until(connection, b"never") == b""
    running.held.let()
    until(running.quiet)


def test_a_slow_body(running: Running) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 90\r\n\r\n{{".encode()
    with connect(running.port, head) as connection:
        assert b" 408 " in read_until(connection, b"}}")


def test_who_does_not_read(running: Running) -> None:
    """Documents asked for over and over, and never read."""
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connect(running.port) as connection:
        connection.settimeout(20)
        with suppress(ConnectionError):
            for _ in range(100_000):
                connection.sendall(ask * 10)
            pytest.fail("all of it was taken")
    until(running.quiet)


def test_idle_connections_stay_usable(running: Running) -> None:
    """The time for a header begins with its first byte, or with the connection."""
    with connect(running.port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as connection:
        assert b"OK" in read_until(connection, b"OK")
        time.sleep(2 * QUICK_S)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"OK" in read_until(connection, b"OK")


def test_bodies_together(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is within its limit, and still more than there is room for beside another."""
    patient = replace(running.service.options, body_s=30.0)
    monkeypatch.setattr(running.service.bodies, "_options", patient)
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n".encode()
    with connect(running.port, head + b" " * 900_000):
        until(lambda: running.service.bodies._held >= 900_000)
        answer = httpx.post(running.url + PATH, content=b" " * 900_000)
        assert answer.status_code == 429
        assert "retry-after" in answer.headers
    until(lambda: running.service.bodies._held == 0)


def test_a_length_that_lies(running: Running) -> None:
    """More is sent than was said: the rest is neither part of the body nor a request."""
    with connect(running.port, post_bytes("/tokenize", {"prompt": "x"}) + b"y" * 5000) as found:
        assert b" 400 " in read_until(found, b"received.")
    until(running.quiet)
