"""Models that clients have downloaded while the server runs, and removed again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn, Protocol

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from squall.errors import EngineStopped
from squall.server.asking import parse, read_body, takes
from squall.server.dialect import Event
from squall.server.errors import OLLAMA, ApiError, to_api
from squall.server.limits import ClientGone
from squall.server.ollama import MEDIA_TYPE, line
from squall.server.ollama_models import ModelBody
from squall.server.residence import AnyStanding, Lazy

if TYPE_CHECKING:
    from squall.server.service import Service

POLL_S = 0.3  # how often a client hears of its download, and is looked for
Progress = Callable[[int, int], None]


class Store(Protocol):
    """Where models come from that clients name; any thread may ask."""

    def pull(self, name: str, progress: Progress) -> Lazy:
        """Download what is not here of a model; raises what is wrong, also what `progress` does."""

    def remove(self, name: str) -> None:
        """Remove the files of a model that `pull` has got."""


def add_pulls(router: APIRouter, service: Service) -> None:
    pulls = _Pulls(service)

    async def named(request: Request) -> ModelBody:
        return await read_body(service, request, partial(parse, ModelBody, service.context))

    @router.post("/api/pull", openapi_extra=takes(ModelBody))
    async def pull(request: Request) -> Response:
        """Ollama's download, where the server allows it; the model is served from then on."""
        body = await named(request)
        steps = pulls.steps(body.model, request)
        told = await anext(steps)  # raises what is refused
        if body.stream:
            return StreamingResponse(_lines(told, steps), media_type=MEDIA_TYPE)
        return JSONResponse([told async for told in steps][-1])

    @router.delete("/api/delete", openapi_extra=takes(ModelBody))
    async def delete(request: Request) -> Response:
        """Ollama's removal of a model, of those that were downloaded so."""
        await pulls.remove(service.standing((await named(request)).model))
        return Response()


async def _lines(first: Event, steps: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    yield line(first)
    try:
        async for told in steps:
            yield line(told)
    except ClientGone:
        pass
    except Exception as error:
        yield to_api(error).body(OLLAMA).encode() + b"\n"


class _Pull:
    """A download under way; it ends when nobody waits for it any more, or the server does."""

    def __init__(self, service: Service, store: Store, name: str) -> None:
        self.name, self.stopped = name, False
        self._service, self._seen = service, (0, 0)
        begin = partial(store.pull, name, self._progress)
        self.work = asyncio.wrap_future(service.submit(begin, reads=True))
        self.work.add_done_callback(lambda work: work.cancelled() or work.exception())  # if gone

    def _progress(self, done: int, whole: int) -> None:
        self._seen = done, whole
        if self.stopped or self._service.draining:
            raise EngineStopped("the download was cancelled")

    def told(self) -> Event:
        digest, (done, whole) = hashlib.sha256(self.name.encode()).hexdigest(), self._seen
        counts = {"total": whole, "completed": done} if whole else {}
        return {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}", **counts}


class _Pulls:
    """What clients have downloaded, one model at a time; it belongs to the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = service.options.store
        self._names: set[str] = set()
        self._current: _Pull | None = None

    async def steps(self, name: str, request: Request) -> AsyncIterator[Event]:
        """What is told of a download, until the model is served; at first raises ApiError."""
        pull = None if name in self._service.cards else self._begin(name)
        try:
            yield {"status": "pulling manifest"}
            while pull is not None and not pull.work.done():
                yield pull.told()
                await asyncio.wait({pull.work}, timeout=POLL_S)
                if await request.is_disconnected():
                    raise ClientGone
            if pull is not None:
                self._service.add(name, pull.work.result())
                self._names.add(name)
                yield pull.told()
        finally:
            if pull is not None:
                pull.stopped = True
        yield {"status": "success"}

    def _begin(self, name: str) -> _Pull:
        if self._store is None:
            self._refuse(f"there is no model {name!r:.200}, and none is downloaded")
        if self._current is not None and not self._current.work.done():
            raise ApiError(
                429, f"{self._current.name!r:.200} is being downloaded; ask again when it is here",
                "pull_under_way", headers={"Retry-After": "30"},
            )  # fmt: skip
        self._current = _Pull(self._service, self._store, name)
        return self._current

    async def remove(self, standing: AnyStanding) -> None:
        """The model is served no more, and its files are gone. Raises ApiError."""
        name, service = standing.name, self._service
        if self._store is None or name not in self._names:
            self._refuse(f"{name!r:.200} stays, as no client had it downloaded; squall rm removes")
        path = (await service.learn(standing)).path
        for other in service.all:
            if other is not standing and (await service.learn(other)).path == path:
                raise ApiError(409, f"{other.name!r:.200} has the same files", "model_in_use")
        await service.residence.unload(standing)
        if standing.users or standing.waiting or name not in self._names:
            raise ApiError(409, f"{name!r:.200} has requests under way", "model_in_use")
        self._names.remove(name)
        service.forget(standing)
        removing = service.submit(partial(self._store.remove, name), reads=True)
        await asyncio.wrap_future(removing)

    def _refuse(self, why: str) -> NoReturn:
        raise ApiError(
            403, f"{why}; clients may download models, and remove those, where the server was "
            "started with --allow-pull", "pull_not_allowed", param="model",
        )  # fmt: skip
