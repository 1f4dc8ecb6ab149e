"""One request on its way: from the queue to the last byte, or until nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from squall.server.dialect import Dialect, Running
from squall.server.errors import to_api
from squall.server.gate import Visit
from squall.server.limits import ClientGone
from squall.server.residence import AnyStanding
from squall.server.service import Service

STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
# A dead engine tells its requests so; whoever was not told by then is told by the server.
LAST_WORD_S = 1.0

_Value = TypeVar("_Value")
_Job = TypeVar("_Job", bound=Running)


class Answer(Response):
    """Starts a job beside the event loop, once its model is loaded, and sends what comes of it.

    What happens first counts: the answer is complete, the client is gone, the engine is dead. The
    job is cancelled unless it is complete.
    """

    def __init__(
        self, service: Service, served: AnyStanding, start: Callable[[], Running], dialect: Dialect,
        *, stream: bool, reads: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self._service = service
        self._served = served
        self._start = start
        self._dialect = dialect
        self._stream = stream
        self._reads = reads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit: Visit = scope["state"]["visit"]
        writer = Writer(scope, receive, send, self._dialect)
        run = asyncio.ensure_future(self._run(visit, writer))
        gone = asyncio.ensure_future(_gone(receive))
        dead = asyncio.ensure_future(self._served.dead.wait())
        try:
            await asyncio.wait({run, gone, dead}, return_when=asyncio.FIRST_COMPLETED)
            if not run.done() and not gone.done():
                await asyncio.wait({run, gone}, timeout=LAST_WORD_S)
        finally:
            ended, left = run.done(), gone.done()
            for task in (run, gone, dead):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await run
        if ended:
            return
        if left or self._served.why_dead is None:
            raise ClientGone
        await writer.error(self._served.why_dead)

    async def _run(self, visit: Visit, writer: Writer) -> None:
        def start() -> Running:
            job = self._start()
            visit.entered()  # at once: who is counted twice takes another's place
            return job

        try:
            await self._have(visit, writer)
        except Exception as error:
            await writer.error(error)
            return
        try:
            job = await begun(self._service.submit(start, reads=self._reads))
        except Exception as error:
            await writer.error(error)
            return
        try:
            if self._stream:
                await self._send_stream(job, writer)
            else:
                text = await self._dialect.whole(job)
                await writer.whole(Response(text, media_type="application/json"))
        except Exception as error:
            await writer.error(error)
        finally:
            job.close()
            self._note(job, visit)

    async def _have(self, visit: Visit, writer: Writer) -> None:
        """Until the model is loaded."""
        work = self._service.use(self._served, visit)
        if self._served.ready:
            await work
            return
        using = asyncio.ensure_future(work)
        try:
            await self._patiently(using, writer)
        finally:
            using.cancel()

    async def _send_stream(self, job: Running, writer: Writer) -> None:
        chunks = aiter(job.chunks_async())
        upcoming = asyncio.ensure_future(_next(chunks))
        try:
            while (chunk := await self._patiently(upcoming, writer)) is not None:
                upcoming = asyncio.ensure_future(_next(chunks))
                await writer.part(self._dialect.part(job, chunk))
        finally:
            upcoming.cancel()
        await writer.part(self._dialect.end(job), last=True)

    async def _patiently(self, coming: asyncio.Future[_Value], writer: Writer) -> _Value:
        """What comes; a stream is told meanwhile that there is nothing yet."""
        while not coming.done():
            await asyncio.wait({coming}, timeout=self._service.options.keep_alive_s)
            if not coming.done() and self._stream:
                await writer.part(self._dialect.silence)
        return coming.result()

    def _note(self, job: Running, visit: Visit) -> None:
        if (usage := job.usage) is None:
            return
        self._service.metrics.observe(self._served.name, usage)
        visit.notes |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        if self._service.options.throughput:
            visit.notes |= {
                "prompt_tokens_per_second": round(usage.avg_prompt_tok_per_sec, 1),
                "completion_tokens_per_second": round(usage.avg_compl_tok_per_sec, 1),
            }


class Writer:
    """Sends one response: whole, as a stream, or an error in the place of either."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, dialect: Dialect) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._dialect = dialect
        self._started = False

    async def whole(self, response: Response) -> None:
        self._started = True
        await response(self._scope, self._receive, self._send)

    async def part(self, data: bytes, *, last: bool = False) -> None:
        """A part of a stream; the first one starts it, so that errors until then have a status."""
        if not self._started:
            self._started = True
            kind = (b"content-type", self._dialect.media_type.encode())
            start = {"type": "http.response.start", "status": 200}
            start["headers"] = [kind, *STREAM_HEADERS]
            await self._send(start)
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def error(self, error: Exception) -> None:
        """An error response, or in the middle of a stream an event and the end."""
        told = to_api(error)
        if self._started:
            await self.part(self._dialect.failed(told), last=True)
        else:
            await self.whole(told.response(self._scope["path"]))


async def _gone(receive: Receive) -> None:
    """Until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(chunks: AsyncIterator[Any]) -> Any:
    return await anext(chunks, None)


async def begun(starting: Future[_Job]) -> _Job:
    """A job; if the client leaves before it is there, it is closed when it is."""
    try:
        return await asyncio.wrap_future(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(_close)
        raise


def _close(starting: Future[_Job]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().close()
