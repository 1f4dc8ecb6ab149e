"""Runs the server in this process: signals, an orderly end, and an end for a dead engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from squall.errors import InvalidRequest
from squall.server.app import create_app, service_of
from squall.server.errors import ApiError
from squall.server.limits import protocol
from squall.server.log import JsonFormatter
from squall.server.options import ServerOptions
from squall.server.residence import AnyStanding
from squall.server.service import Models, Service

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What is already computed must still reach its reader.
LAST_BYTES_S = 5.0
# How long /health says 503 before a process with a dead engine ends.
LINGER_S = 1.0
DEAD = 1


def serve_on(
    models: Models,
    options: ServerOptions,
    listener: socket.socket,
    *,
    started: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal comes or the engine dies; the exit status for the process.

    A first signal refuses what is new and lets running answers end within `options.drain_s`; a
    second one ends the process at once.
    """
    _log_as_json()
    server = make_server(models, options, started)
    server.run(sockets=[listener])
    service, status = server.service, DEAD if server.service.failed else 0
    stuck = any(served.model.engine.alive for served in service.failed)
    if stuck or service.residence.opening:
        # What never ends, or not soon, cannot be waited for, and the interpreter would.
        os._exit(status)
    return status


def make_server(
    models: Models,
    options: ServerOptions,
    started: Callable[[], None] = lambda: None,
) -> Server:
    app = create_app(models, options)
    config = uvicorn.Config(
        app,
        http=protocol(options),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        backlog=1024,
    )
    return Server(config, service_of(app), started)


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("uvicorn.error", "squall"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, not listening yet. Port 0: any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InvalidRequest(
            f"cannot listen on {host} port {port}: {error.strerror}; choose others with "
            "--serve-ip and --port"
        ) from None
    return listener


class Server(uvicorn.Server):
    """uvicorn's server with other ideas about its end."""

    def __init__(
        self, config: uvicorn.Config, service: Service, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.service = service
        self._tell_started = started
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for served in self.service.models.values():
            if served.ready:
                served.model.grammars.warm()
        try:
            await self.service.preload()
        except ApiError as error:
            raise InvalidRequest(error.message) from None
        await super().startup(sockets)
        # What is there by now stays; looking for garbage in it would stop everything for 50 ms.
        gc.collect()
        gc.freeze()
        self._tell_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        gc.unfreeze()  # what is garbage by now is freed, native memory too

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals; unlike uvicorn's, an orderly end is no death by signal."""
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        except ValueError:  # not the main thread, so signals are somebody else's
            before = {}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.service.draining or not self.started:
            os._exit(128 + sig)
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        service = self.service
        if self._ending is None and (service.draining or service.why_dead is not None):
            self._ending = asyncio.create_task(self._end())
        return await super().on_tick(counter)

    async def _end(self) -> None:
        dead = self.service.why_dead is not None
        self.service.residence.stop()
        alive = [s for s in self.service.all if not s.dead.is_set()]
        for standing in alive:
            if not (standing.ready or standing.users):  # who waits has got nothing yet
                standing.die("the server is shutting down; ask another one", failed=False)
        await asyncio.gather(*map(self._drain, alive))
        if dead:
            await asyncio.sleep(LINGER_S)
        await self._last_bytes()

    async def _drain(self, standing: AnyStanding) -> None:
        """Let answers end; cancel what is left then."""
        ends = {asyncio.ensure_future(end.wait()) for end in (standing.idle, standing.dead)}
        drain_s = self.service.options.drain_s
        await asyncio.wait(ends, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if not standing.idle.is_set():
            standing.die("the server is shutting down and waits no longer", failed=False)
        for end in ends:
            end.cancel()

    async def _last_bytes(self) -> None:
        for _ in range(int(LAST_BYTES_S / 0.05)):
            if not self.service.active:
                break
            await asyncio.sleep(0.05)
        self.should_exit = True
