"""Which models of a server are in memory: loaded for whom asks for them, and unloaded again."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from squall.server.errors import ApiError, stopped, to_api

Kind = Literal["text", "pictures", "embeddings"]
State = Literal["unloaded", "loading", "loaded", "failed"]

LOGGER = logging.getLogger("squall.server")

_Model = TypeVar("_Model")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Lazy:
    """A model that is opened when it is asked for.

    pinned: once it is loaded, it stays. keep_alive_s: it is unloaded when nobody has used it for so
    long; None or negative: only where another one needs its memory.
    """

    kind: Kind
    open: Callable[[], Any]
    pinned: bool = False
    keep_alive_s: float | None = None


class Standing(ABC, Generic[_Model]):
    """How a model that is served is, whatever it makes. All of it belongs to the event loop.

    dead: nothing will be answered any more, for the reason `why_dead`. failed: that was an error.
    users: the requests that have it; waiting: those that get it as soon as it is loaded.
    leaving: it is about to be unloaded, and who comes now waits until it is loaded again.
    """

    kind: ClassVar[Kind]

    def __init__(self, name: str, lazy: Lazy | None, model: _Model | None = None) -> None:
        """lazy: None for a `model` that is open, and belongs to somebody else."""
        self.name = name
        self.lazy = lazy
        self.created = int(time.time())
        self.dead = asyncio.Event()
        self.why_dead: ApiError | None = None
        self.failed = False
        self.pinned = lazy is None or lazy.pinned
        self.keep_alive_s = None if lazy is None else lazy.keep_alive_s
        self.state: State = "unloaded" if model is None else "loaded"
        self.problem = ""
        self.users: set[object] = set()
        self.waiting: set[object] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        self.used_s = 0.0
        self.leaving = False
        self.loading: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._model = model

    @property
    def model(self) -> _Model:
        if self._model is None:
            raise stopped(f"the model {self.name!r:.200} is not loaded")
        return self._model

    @property
    @abstractmethod
    def most(self) -> int:
        """How many requests may run and wait."""

    @property
    def ready(self) -> bool:
        """Whether requests can have the model at once."""
        return self._model is not None and not self.leaving

    @property
    def card(self) -> dict[str, Any]:
        """What clients are told of it."""
        card = {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "local",
            "root": self.name, "parent": None, "kind": self.kind, "state": self.state,
            "pinned": self.pinned,
        }  # fmt: skip
        return card | {"error": self.problem} if self.state == "failed" else card

    @property
    def cards(self) -> dict[str, dict[str, Any]]:
        """It, and what else is called by names of its own."""
        return {self.name: self.card}

    def die(self, reason: str, *, failed: bool = True) -> None:
        """Every request for it ends with an error."""
        self.why_dead = self.why_dead or stopped(reason)
        self.failed = self.failed or failed
        self.dead.set()

    def prepare(self, model: _Model) -> None:
        """Make a model ready that was opened just now; beside the event loop."""

    def take(self, model: _Model) -> None:
        """From now on it is loaded, and who waited has it."""
        self._model, self.state, self.problem = model, "loaded", ""
        self.users |= self.waiting
        self.waiting.clear()
        if self.users:
            self.idle.clear()

    def give(self) -> _Model:
        """From now on it is not loaded: the model, to be closed."""
        model, self._model, self.state = self.model, None, "unloaded"
        return model

    def drain(self, timeout_s: float) -> bool:  # noqa: ARG002
        """Take nothing new, and wait for what there is; whether all of it ended in time."""
        return True


AnyStanding = Standing[Any]


class Residence:
    """Loads and unloads models, one at a time, beside the event loop that it belongs to."""

    def __init__(self, standings: Iterable[AnyStanding]) -> None:
        self._standings = [*standings]
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loader = ThreadPoolExecutor(1, "squall-loader")
        self._closing = False
        self.opening = False  # whether the loader's thread is at it

    async def use(self, standing: AnyStanding, user: object) -> None:
        """`user` has the model until `leave`, and it is loaded first. Raises ApiError."""
        if standing.timer is not None:
            standing.timer.cancel()
            standing.timer = None
        if standing.ready:
            standing.users.add(user)
            standing.idle.clear()
            return
        standing.waiting.add(user)
        try:
            await self.load(standing)
        finally:
            standing.waiting.discard(user)

    def leave(self, standing: AnyStanding, user: object) -> None:
        """`user` is done with the model."""
        standing.waiting.discard(user)
        standing.users.discard(user)
        if not standing.users:
            standing.idle.set()
            self._rest(standing)

    def keep(self, standing: AnyStanding, seconds: float | None) -> None:
        """Unload it when nobody has used it for so long; None or negative: never for that."""
        standing.keep_alive_s = seconds
        if not standing.users:
            self._rest(standing)

    async def load(self, standing: AnyStanding) -> None:
        """Load a model if it is not, once for all who ask. Raises ApiError."""
        if standing.ready:
            return
        if standing.loading is None:
            standing.loading = self._begin(self._load(standing))
        loading = standing.loading
        dead = asyncio.ensure_future(standing.dead.wait())
        try:
            await asyncio.wait({loading, dead}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            dead.cancel()
        if not loading.done() and standing.why_dead is not None:
            raise standing.why_dead
        loading.result()

    async def unload(self, standing: AnyStanding, *, wait: bool = False) -> None:
        """Close a model that is loaded. Raises ApiError if it is pinned, or used: unless `wait`."""
        if standing.pinned:
            why = f"the model {standing.name!r:.200} is pinned, and stays"
            raise ApiError(409, why, "model_pinned")
        if (standing.users or standing.waiting) and not wait:
            raise ApiError(
                409, f"the model {standing.name!r:.200} has requests under way; ask again when "
                "they have ended, or with ?wait=true", "model_in_use",
            )  # fmt: skip
        await asyncio.shield(self._begin(self._unload(standing)))

    async def close(self) -> None:
        """Close what was opened here; what is being opened is closed when it is."""
        self._closing = True
        for task in [*self._tasks]:
            task.cancel()
        for standing in self._standings:
            if standing.timer is not None:
                standing.timer.cancel()
            # A step that never ends cannot be waited for.
            if standing.lazy is not None and standing.state == "loaded" and not standing.failed:
                await asyncio.to_thread(standing.give().close)
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # who waited has it; maybe nobody did

    def _rest(self, standing: AnyStanding) -> None:
        """Nobody uses it now."""
        standing.used_s = time.monotonic()
        if standing.timer is not None:
            standing.timer.cancel()
            standing.timer = None
        kept_s = standing.keep_alive_s
        if standing.ready and not standing.pinned and kept_s is not None and kept_s >= 0:
            loop = asyncio.get_running_loop()
            standing.timer = loop.call_later(kept_s, self._expire, standing)

    def _expire(self, standing: AnyStanding) -> None:
        standing.timer = None
        if not self._closing and not standing.users and not standing.waiting:
            self._begin(self._unload(standing))

    async def _load(self, standing: AnyStanding) -> None:
        failure = None
        try:
            async with self._lock:
                if standing.ready:  # as it has stayed after all
                    return standing.take(standing.model)
                self._check_open(standing)
                standing.state = "loading"
                try:
                    standing.take(await self._work(lambda: self._opened(standing)))
                except Exception as error:
                    failure = _failure(standing, error)
            if failure is not None:  # out of the handler, whose error holds half a model
                standing.state, standing.problem = "failed", failure.message
                await self._work(_tidy)
                raise failure
            if not standing.users:
                self._rest(standing)
        finally:
            standing.loading = None

    def _check_open(self, standing: AnyStanding) -> None:
        if self._closing:
            raise stopped("the server is shutting down; ask another one")
        if standing.why_dead is not None:
            raise standing.why_dead

    def _opened(self, standing: AnyStanding) -> Any:
        """On the loader's thread."""
        assert standing.lazy is not None
        self.opening = True
        try:
            model = standing.lazy.open()
            try:
                standing.prepare(model)
            except BaseException:
                model.close()
                raise
            if self._closing:
                model.close()
            return model
        finally:
            self.opening = False

    async def _unload(self, standing: AnyStanding) -> None:
        async with self._lock:
            await self._give_back(standing)

    async def _give_back(self, standing: AnyStanding) -> None:
        """Close a model when its last request has ended; the lock is held."""
        if standing.state != "loaded" or standing.pinned or standing.failed:
            return
        standing.leaving = True
        try:
            await standing.idle.wait()
            await self._work(standing.give().close)
            await self._work(_tidy)
        finally:
            standing.leaving = False

    async def _work(self, function: Callable[[], _Value]) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(self._loader, function)


def _failure(standing: AnyStanding, error: Exception) -> ApiError:
    """What all are told who waited for a model."""
    told = to_api(error)
    status = 503 if told.status >= 500 else 400
    text = f"the model {standing.name!r:.200} could not be loaded: {told.message}"
    LOGGER.warning(text)
    return ApiError(status, text, told.code, told.type, headers=told.headers)


def _tidy() -> None:
    """Give memory back that a model had."""
    if frozen := gc.get_freeze_count():
        gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
    with suppress(AttributeError, OSError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)
