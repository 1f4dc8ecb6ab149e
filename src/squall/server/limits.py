"""How much a client may send, and how long it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import httptools
from starlette.types import Receive
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from squall.server.errors import ApiError
from squall.server.options import ServerOptions

HEADER_BYTES = 64 * 1024
MOST_PIPELINED = 16
MOST_CONNECTIONS = 1000
_FRAMING = (b"content-length", b"transfer-encoding")
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\n"
    b"content-length: 0\r\n\r\n"
)


# Reading JSON keeps every other thread waiting, and most of that goes into objects and names.
MOST_VALUES = 10**6
_COSTLY = b"[{:"
_COST = 8


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Bodies:
    """Reads request bodies; what they take together is bounded."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self._held = 0

    @contextmanager
    def hold(self) -> Iterator[Body]:
        """A body, whose bytes count until the end."""
        body = Body(self)
        try:
            yield body
        finally:
            self._held -= len(body.data)

    def check(self, size: int, new: int) -> None:
        """Raises ApiError if a body of `size` bytes, `new` of them not held yet, is too much."""
        most = self._options.body_bytes
        if size > most:
            raise ApiError(
                413, f"the body is larger than the {most} bytes allowed", "request_too_large"
            )
        if self._held + new > self._options.all_bodies_bytes:
            raise ApiError(
                429, "too many large requests at a time", "rate_limit_exceeded",
                "rate_limit_error", headers={"Retry-After": "1"},
            )  # fmt: skip

    def add(self, size: int) -> None:
        """So many bytes came."""
        self._held += size

    @property
    def seconds(self) -> float:
        """How long a body may take."""
        return self._options.body_s


class Body:
    """One request's body."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.data = bytearray()

    async def read(self, receive: Receive, declared: str | None) -> bytes:
        """All of it. Raises ClientGone, and ApiError if it is too large or too slow."""
        if declared is not None and declared.isdigit():
            self._bodies.check(int(declared), int(declared))
        try:
            await asyncio.wait_for(self._read(receive), self._bodies.seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not come within {self._bodies.seconds:g} s", "timeout",
                headers={"Connection": "close"},
            ) from None  # fmt: skip
        return bytes(self.data)

    async def _read(self, receive: Receive) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            self._bodies.check(len(self.data) + len(part), len(part))
            self.data += part
            self._bodies.add(len(part))
            more = message.get("more_body", False)


def check_values(data: bytes, context: int) -> None:
    """Raises ApiError for JSON of so many values that others would notice its being read.

    Those that are text of a message count too; as many as the context has tokens are free.
    """
    costly = len(data) - len(data.translate(None, _COSTLY))
    if data.count(b",") + _COST * (costly - context) > MOST_VALUES:
        raise ApiError(400, "the body has too many values, lists or objects", "too_many_values")


def check_encoding(encoding: str | None) -> None:
    """Raises ApiError for a body that is compressed, which could be far larger than it seems."""
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise ApiError(
            415, f"Content-Encoding is {encoding[:100]!r}; send the body as it is",
            "unsupported_encoding", headers={"Accept-Encoding": "identity"},
        )  # fmt: skip


def protocol(options: ServerOptions) -> type[HttpToolsProtocol]:
    """Connections that end if a header is too long or too slow, or nobody takes what is sent."""

    class Protocol(_Protocol):
        limits = options

    return Protocol


class _Parser(httptools.HttpRequestParser):
    """Declines offers to change the protocol, which leave a request and its body valid.

    httptools takes them for the end of the request; what follows goes to a parser of bodies.
    """

    def __init__(self, protocol: _Protocol) -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._protocol = protocol
        self._body: httptools.HttpRequestParser | None = None

    def should_upgrade(self) -> bool:
        """Whether the body is still to be asked for."""
        return self._body is None and super().should_upgrade()

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """Parse; raises what httptools raises."""
        if self._body is not None:
            self._body.feed_data(data)
            return
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            to = self._protocol
            to.cycle.keep_alive = False
            kept = [b": ".join(pair) for pair in to.headers if pair[0] in _FRAMING]
            head = b"\r\n".join([b"POST / HTTP/1.1", *kept, b"", b""])
            told = SimpleNamespace(on_body=to.on_body, on_message_complete=to.on_message_complete)
            self._body = httptools.HttpRequestParser(told)
            self._body.feed_data(head + data[offer.args[0] :])


class _Protocol(HttpToolsProtocol):
    limits: ServerOptions
    _header: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _in_header = True
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(_FULL)
            transport.close()
            return
        self.parser = _Parser(self)
        # Paused whenever the system does not take all, so that the timer sees who reads not.
        transport.set_write_buffer_limits(high=0)
        self._expect_header()

    def data_received(self, data: bytes) -> None:
        if self._in_header:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_header and self._header_bytes > HEADER_BYTES:
            self.send_400_response("The header is too large.")
        if len(self.pipeline) > MOST_PIPELINED:
            self.transport.abort()
        if self.cycle is None or self.cycle.response_complete:
            self._expect_header()
        else:
            _stop(self._header)
            self._header = None

    def on_headers_complete(self) -> None:
        self._in_header, self._header_bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_header = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._header)
        _stop(self._writing)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        _stop(self._writing)
        super().resume_writing()

    def _expect_header(self) -> None:
        if self._header is None:
            self._header = self.loop.call_later(self.limits.header_s, self.transport.close)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
