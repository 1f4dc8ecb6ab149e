"""How much a client may send, and how long it may take."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from squall.server.errors import ApiError
from squall.server.options import ServerOptions

HEADER_BYTES = 64 * 1024
MOST_PIPELINED = 16
MOST_CONNECTIONS = 1000
# An offer to change the protocol. The parser would take it for the end of the request; without it
# request and body are valid as they are.
_OFFER = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)
_PART = re.compile(rb"\r(\n(u[^\n]*)?)?\Z", re.IGNORECASE)  # what may become an offer
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

    @asynccontextmanager
    async def read(self, receive: Receive, declared: str | None) -> AsyncIterator[bytes]:
        """A body, whose bytes count until the end.

        Raises ClientGone, and ApiError if it is too large or too slow.
        """
        if declared is not None and declared.isdigit():
            self._check(int(declared), int(declared))
        data, seconds = bytearray(), self._options.body_s
        try:
            try:
                await asyncio.wait_for(self._fill(data, receive), seconds)
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"the body did not come within {seconds:g} s", "timeout",
                    headers={"Connection": "close"},
                ) from None  # fmt: skip
            yield bytes(data)
        finally:
            self._held -= len(data)

    def hold(self, size: int) -> None:
        """So many bytes are held for longer; or no more, if it is below 0."""
        self._held += size

    async def _fill(self, data: bytearray, receive: Receive) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            self._check(len(data) + len(part), len(part))
            data += part
            self._held += len(part)
            more = message.get("more_body", False)

    def _check(self, size: int, new: int) -> None:
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


class _Protocol(HttpToolsProtocol):
    limits: ServerOptions
    _header: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _in_header = True
    _header_bytes = 0
    _held = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(_FULL)
            transport.close()
            return
        # Paused whenever the system does not take all, so that the timer sees who reads not.
        transport.set_write_buffer_limits(high=0)
        self._expect_header()

    def data_received(self, data: bytes) -> None:
        if self._in_header:
            self._header_bytes += len(data)
            data = self._without_offer(data)
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

    def _without_offer(self, data: bytes) -> bytes:
        """The same without a line that offers another protocol, also where that comes in parts."""
        head, end, body = (self._held + data).partition(b"\r\n\r\n")
        part = None if end else _PART.search(head)
        self._held = b""
        if part is not None:
            head, self._held = head[: part.start()], part[0]
        return _OFFER.sub(b"\r\nConnection: close", head + end) + body

    def on_headers_complete(self) -> None:
        self._in_header, self._header_bytes = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
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
