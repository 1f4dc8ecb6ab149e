"""Servers for tests: in a process of their own, or in a thread with an engine one can hold."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squall import Model
from squall.batch import Batch
from squall.server.options import ServerOptions
from squall.server.run import Server, listen, make_server
from squall.server.service import Service

WAIT_S = 30.0


def until(true: Callable[[], bool], seconds: float = WAIT_S) -> None:
    """Wait until something is true."""
    end_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end_s, "it did not come true in time"
        time.sleep(0.005)


class Held:
    """An executor whose steps can be held, let go one by one, and made to fail."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._lock = threading.Condition()
        self._allowed = float("inf")
        self.steps = 0
        self.fail: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def hold(self) -> None:
        """Steps wait from now on."""
        with self._lock:
            self._allowed = 0

    def let(self, steps: float = float("inf")) -> None:
        """Let so many steps go."""
        with self._lock:
            self._allowed = steps
            self._lock.notify_all()

    def step(self, batch: Batch) -> Any:
        with self._lock:
            assert self._lock.wait_for(lambda: self._allowed > 0, WAIT_S)
            self._allowed -= 1
            self.steps += 1
        if self.fail is not None:
            raise self.fail
        return self._executor.step(batch)


@dataclass
class Running:
    """A server in a thread."""

    host: str
    port: int
    model: Model
    server: Server
    held: Held

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def service(self) -> Service:
        return self.server.service

    def quiet(self) -> bool:
        """No request is anywhere, and no block is in use."""
        stats = self.model.engine.stats()
        return stats.running == stats.waiting == stats.blocks_used == 0 == self.service.active


@contextmanager
def in_thread(model: Model, **options: Any) -> Iterator[Running]:
    """A server of `model` until the end of the block."""
    started = threading.Event()
    server = make_server(model, ServerOptions(**options), started.set)
    listener = listen("127.0.0.1", 0)
    held = Held(model.engine.executor)
    model.engine.executor = held
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(WAIT_S)
        yield Running("127.0.0.1", listener.getsockname()[1], model, server, held)
    finally:
        held.let()
        server.should_exit = True
        thread.join(WAIT_S)
        model.engine.executor = held._executor
        model.engine.on_death = None
        assert not thread.is_alive()


@dataclass
class Serving:
    """A server of several models in a thread."""

    port: int
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def service(self) -> Service:
        return self.server.service


@contextmanager
def serving(models: Any, **options: Any) -> Iterator[Serving]:
    """A server until the end of the block, of a model or of several by name."""
    started = threading.Event()
    server = make_server(models, ServerOptions(**options), started.set)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(WAIT_S)
        yield Serving(listener.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


@dataclass
class Process:
    """`squall serve` in a process."""

    process: subprocess.Popen[bytes]
    errors: Path
    port: int = 0
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stderr(self) -> str:
        return self.errors.read_text(encoding="utf-8")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


@contextmanager
def in_process(
    errors: Path, *arguments: str, command: tuple[str, ...] = ("-m", "squall", "serve"), **env: str
) -> Iterator[Process]:
    """A server of the default model on a free port."""
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", "0", *arguments],
            stderr=stderr,
            stdout=stderr,
            env=os.environ | env,
        )
    found = Process(process, errors)
    try:
        where = re.compile(r" at http://127\.0\.0\.1:(\d+)/v1")
        until(lambda: process.poll() is not None or bool(where.search(found.stderr())))
        match = where.search(found.stderr())
        assert match is not None, found.stderr()
        found.port = int(match[1])
        yield found
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(WAIT_S)


def post_bytes(path: str, body: Any, *headers: str) -> bytes:
    """A POST request as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def connect(port: int, data: bytes = b"") -> socket.socket:
    """A socket that has sent `data`."""
    found = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
    found.sendall(data)
    return found


def leave_in_the_middle(running: Running, path: str, body: Any) -> None:
    """Ask, get some tokens, and go; nothing is computed or kept for it then."""
    running.held.hold()
    leaving = connect(running.port, post_bytes(path, body))
    until(lambda: running.model.engine.stats().running == 1)
    running.held.let(3)
    leaving.close()
    until(lambda: running.service.active == 0)
    running.held.let()
    until(running.quiet, 2)


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    """What comes, up to `wanted` or the end."""
    found = b""
    while wanted not in found:
        part = connection.recv(65536)
        if not part:
            break
        found += part
    return found


def events(text: str) -> list[Any]:
    """The data of an event stream, `[DONE]` as a string."""
    found = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def chat(text: str = "Hi!", **fields: Any) -> dict[str, Any]:
    """The body of a chat."""
    return {"messages": [{"role": "user", "content": text}], **fields}
