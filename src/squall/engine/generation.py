"""One answer as an iterator of pieces, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

from squall.closing import Closing
from squall.engine.engine import FORKED, Engine
from squall.engine.request import FinishReason, Piece, Request, Usage
from squall.engine.sampling import Sampling
from squall.errors import EngineStopped

_Mail = TypeVar("_Mail")


class Mailbox(Generic[_Mail]):
    """Carries pieces from the engine's thread to a thread or a task that waits for them."""

    def __init__(self) -> None:
        self._pieces: SimpleQueue[_Mail] = SimpleQueue()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._process = os.getpid()

    def put(self, piece: _Mail) -> None:
        """Never blocks."""
        self._pieces.put(piece)
        if self._waiter is not None:
            loop, arrived = self._waiter
            loop.call_soon_threadsafe(arrived.set)

    def get(self) -> _Mail:
        self._check_process()
        return self._pieces.get()

    async def get_async(self) -> _Mail:
        self._check_process()
        arrived = asyncio.Event()
        self._waiter = asyncio.get_running_loop(), arrived
        try:
            while self._pieces.empty():
                await arrived.wait()
                arrived.clear()
            return self._pieces.get_nowait()
        finally:
            self._waiter = None

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise EngineStopped(FORKED)


class Generation(Closing, Iterator[Piece], AsyncIterator[Piece]):
    """An iterator of pieces, for `for` and for `async for`.

    The engine goes on by itself; stopping early is `close()`, or letting go of the iterator.

    `finish_reason`: "stop" (an end token or a stop string), "length" (max_tokens or the context is
    used up), "cancelled" (closed before the end), "error" (raised as well), None while running.
    `ids`: those of the pieces so far; `text`: all that they said, also after `read`.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.sampling: Sampling = request.sampling
        self.finish_reason: FinishReason | None = None
        self.ids: list[int] = []
        self._texts: list[str] = []
        self._pieces: Mailbox[Piece] = Mailbox()
        self._reply = engine.submit(request, self._pieces.put)

    @property
    def seed(self) -> int:
        """The seed in use: given, or chosen for this answer."""
        return self.sampling.seed

    @property
    def text(self) -> str:
        """What has been read so far."""
        return "".join(self._texts)

    @property
    def usage(self) -> Usage:
        return self._reply.usage

    def __next__(self) -> Piece:
        if self.finish_reason is not None:
            raise StopIteration
        return self._take(self._pieces.get())

    async def __anext__(self) -> Piece:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        return self._take(await self._pieces.get_async())

    def read(self) -> str:
        """The rest of the answer as one string."""
        return "".join(piece.text for piece in self)

    def close(self) -> None:
        """Stop here. The model keeps what was computed, so that a follow-up is cheap."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self._reply.cancel()

    def __repr__(self) -> str:
        state = self.finish_reason or "not at its end; read() waits for it"
        return f"<Generation {self.text!r}: {state}>"

    def __del__(self) -> None:
        # A request that was refused has no answer to cancel.
        if "_reply" in self.__dict__:
            self.close()

    def _take(self, piece: Piece) -> Piece:
        self.finish_reason = piece.finish_reason
        self.ids += piece.ids
        self._texts.append(piece.text)
        if piece.error is not None:
            raise piece.error
        return piece
