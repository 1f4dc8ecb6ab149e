"""Which models of a server are in memory: loaded for whom asks for them, and unloaded again."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Generic, Literal, TypeVar

from squall.about import UNKNOWN, About, of_headers, of_model
from squall.diffusion.model import ImageModel
from squall.errors import OutOfMemory
from squall.machine import available_bytes, give_back
from squall.model import Model
from squall.needs import Kind, Needs, needs
from squall.opening import Opening
from squall.server.errors import ApiError, stopped, to_api

State = Literal["unloaded", "loading", "loaded", "failed"]

LOGGER = logging.getLogger("squall.server")

_Model = TypeVar("_Model")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Lazy:
    """A model that is opened when it is asked for.

    open: how, and what it takes of memory is known before; or a function that does it.
    pinned: it is loaded when the server starts, and stays; preload: only the former.
    keep_alive_s: it is unloaded when nobody has used it for so long; None: only where another one
        needs its memory.
    """

    kind: Kind
    open: Opening | Callable[[], Any]
    pinned: bool = False
    keep_alive_s: float | None = None
    preload: bool = False


class Standing(ABC, Generic[_Model]):
    """How a model that is served is, whatever it makes. All of it belongs to the event loop.

    dead: nothing will be answered any more, for the reason `why_dead`. failed: that was an error.
    users: the requests that have it; waiting: those that get it as soon as it is loaded.
    leaving: it is about to be unloaded, and who comes now waits until it is loaded again.
    nbytes: what it is counted as having of memory, with a KV cache that is full.
    about: what it is, once somebody has asked.
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
        self.loads = 0
        self.leaving = False
        self.loading: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.about: About | None = None
        self._model = model
        self.nbytes = 0 if model is None else sum(self.sizes(model))

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
            "pinned": self.pinned, "capabilities": (self.about or UNKNOWN[self.kind]).capabilities,
        }  # fmt: skip
        return card | {"error": self.problem} if self.state == "failed" else card

    @property
    def cards(self) -> dict[str, dict[str, Any]]:
        """It, and what else is called by names of its own."""
        return {self.name: self.card}

    def look(self) -> About:
        """What it is; beside the event loop. Raises what opening it may."""
        if self._model is not None:
            return of_model(self.kind, self._model)
        how = None if self.lazy is None else self.lazy.open
        return of_headers(self.kind, how) if isinstance(how, Opening) else UNKNOWN[self.kind]

    def sizes(self, model: Any) -> tuple[int, int]:
        """Bytes of weights, and of the KV cache."""
        return sum(total.nbytes for total in model.formats), 0

    def die(self, reason: str, *, failed: bool = True) -> None:
        """Every request for it ends with an error."""
        self.why_dead = self.why_dead or stopped(reason)
        self.failed = self.failed or failed
        self.dead.set()

    def prepare(self, model: _Model) -> None:
        """Make a model ready that was opened just now; beside the event loop."""

    def take(self, model: _Model) -> None:
        """From now on it is loaded, and who waited has it."""
        self._model, self.state, self.problem, self.about = model, "loaded", "", None
        self.loads += 1
        self.admit()

    def admit(self) -> None:
        """Who waits has the model."""
        self.users |= self.waiting
        self.waiting.clear()
        if self.users:
            self.idle.clear()

    def give(self) -> _Model:
        """From now on it is not loaded: the model, to be closed."""
        model, self._model, self.state, self.nbytes = self.model, None, "unloaded", 0
        return model


AnyStanding = Standing[Any]


class Residence:
    """Loads and unloads models, one at a time, beside the event loop that it belongs to.

    limit_bytes: what all together may have of this machine's memory; by default what there is.
    """

    def __init__(self, standings: Sequence[AnyStanding], limit_bytes: int | None = None) -> None:
        self.standings = [*standings]
        self._limit = limit_bytes
        if limit_bytes is None and (free := available_bytes()) is not None:
            held = (standing.sizes(standing.model)[0] for standing in standings if standing.ready)
            self._limit = free + sum(held)
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loader = ThreadPoolExecutor(1, "squall-loader")
        self._closing = False
        self.opening = False  # whether the loader's thread is at it

    async def use(self, standing: AnyStanding, user: object) -> None:
        """`user` has the model until `leave`, and it is loaded first. Raises ApiError."""
        self._check_closing()
        _stop_timer(standing)
        standing.waiting.add(user)
        if standing.ready:
            standing.admit()
            return
        try:
            await self._loaded(standing)
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
        """Unload it when nobody has used it for so long; None: never for that."""
        standing.keep_alive_s = seconds
        if not standing.users:
            self._rest(standing)

    async def load(self, standing: AnyStanding) -> None:
        """Load a model if it is not. Raises ApiError."""
        user = object()
        try:
            await self.use(standing, user)
        finally:
            self.leave(standing, user)

    async def _loaded(self, standing: AnyStanding) -> None:
        """Load a model, once for all who ask. Raises ApiError."""
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
        await asyncio.shield(self._begin(self._unload(standing, wait=wait)))

    def stop(self) -> None:
        """From now on nothing is loaded; what is being opened is closed when it is."""
        self._closing = True

    async def close(self) -> None:
        """Close what was opened here."""
        self.stop()
        for task in [*self._tasks]:
            task.cancel()
        for standing in self.standings:
            _stop_timer(standing)
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
        _stop_timer(standing)
        kept_s = standing.keep_alive_s
        if standing.ready and not standing.pinned and kept_s is not None:
            loop = asyncio.get_running_loop()
            standing.timer = loop.call_later(kept_s, self._expire, standing)

    def _expire(self, standing: AnyStanding) -> None:
        if not self._closing:
            self._begin(self._unload(standing, expired=standing.timer))

    async def _load(self, standing: AnyStanding) -> None:
        failure = None
        try:
            async with self._lock:
                if not standing.waiting:  # all have left before it was its turn
                    return
                self._check_open(standing)
                standing.state = "loading"
                try:
                    await self._bring(standing)
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
        self._check_closing()
        if standing.why_dead is not None:
            raise standing.why_dead

    def _check_closing(self) -> None:
        if self._closing:
            raise stopped("the server is shutting down; ask another one")

    async def _bring(self, standing: AnyStanding) -> None:
        """Make room for a model, and open it; the lock is held."""
        assert standing.lazy is not None
        kind, how, least = standing.lazy.kind, standing.lazy.open, 0
        if isinstance(how, Opening):
            found = await self._work(partial(needs, kind, how, self._most(standing)))
            await self._make_room(standing, found)
            least, how = found.bytes, partial(_OPENERS[kind], self._within(kind, found))
        while (model := await self._work(partial(self._opened, standing, how))) is None:
            for other in self._others(standing)[:1]:
                await self._give_back(other)
        standing.nbytes = max(least, sum(standing.sizes(model)))
        standing.take(model)
        self._begin(self._work(_tidy))  # of what loading left

    def _opened(self, standing: AnyStanding, how: Callable[[], Any]) -> Any:
        """On the loader's thread: the model; None if others are to go first."""
        self.opening = True
        try:
            model = how()
            try:
                standing.prepare(model)
                self._check_closing()
            except BaseException:
                model.close()
                raise
            return model
        except (OutOfMemory, MemoryError):
            if not self._others(standing):
                raise
            return None
        finally:
            self.opening = False

    def _within(self, kind: Kind, found: Needs) -> Opening:
        """How to open a model now, so that it fits beside the others."""
        told = found.opening.progress

        def progress(done: int, whole: int) -> None:
            self._check_closing()
            if told is not None:
                told(done, whole)

        opening = replace(found.opening, progress=progress)
        if kind != "text" or (free := self._free()) is None:
            return opening
        return replace(opening, memory_bytes=max(free, found.bytes))

    # ---- memory ----

    def _free(self) -> int | None:
        """Bytes that no model has, also if all KV caches were full; None: nobody knows."""
        if self._limit is None:
            return None
        left = self._limit - sum(standing.nbytes for standing in self.standings)
        available = available_bytes()
        return left if available is None else min(left, available)

    def _others(self, standing: AnyStanding) -> list[AnyStanding]:
        """Those that can make room: idle ones first, and those that were not used for longest."""
        found = [s for s in self.standings if s.state == "loaded" and s is not standing]
        found = [s for s in found if not s.pinned and not s.dead.is_set()]
        return sorted(found, key=lambda s: (bool(s.users), s.used_s))

    def _most(self, standing: AnyStanding) -> int:
        """What there is for a model if all make room that can."""
        free = self._free()
        if free is None:
            return sys.maxsize
        return free + sum(other.nbytes for other in self._others(standing))

    async def _make_room(self, standing: AnyStanding, found: Needs) -> None:
        """Unload others until there is enough; none, if that would not do. Raises OutOfMemory."""
        while (free := self._free()) is not None and free < found.bytes:
            others = self._others(standing)
            if not others or self._most(standing) < found.bytes:
                raise OutOfMemory(self._short(standing, found))
            await self._give_back(others[0])

    def _short(self, standing: AnyStanding, found: Needs) -> str:
        stay = [s for s in self.standings if s.pinned and s.nbytes]
        pinned = "".join(f", and {s.name!r:.99} stays with {_mib(s.nbytes)}" for s in stay)
        return (
            f"it takes about {_mib(found.bytes)} ({_mib(found.cache)} of that KV cache), and there "
            f"are {_mib(self._most(standing))} at most for it{pinned}; ask for a shorter context "
            "or less KV cache, quantize it, or allow more: --memory-limit"
        )

    async def _unload(
        self, standing: AnyStanding, *, wait: bool = False, expired: object = None
    ) -> None:
        _check_idle(standing, wait)  # at once, and again when others are loaded or unloaded
        async with self._lock:
            _check_idle(standing, wait)
            if expired is None or expired is standing.timer:  # not used meanwhile
                await self._give_back(standing)

    async def _give_back(self, standing: AnyStanding) -> None:
        """Close a model when its last request has ended; the lock is held."""
        if standing.state != "loaded" or standing.pinned or standing.failed:
            return
        standing.leaving = True
        if standing.lazy is not None:  # what a request said of it is over
            standing.keep_alive_s = standing.lazy.keep_alive_s
        try:
            await standing.idle.wait()
            if standing.dead.is_set():  # its step may never end
                return
            await self._work(standing.give().close)
            await self._work(_tidy)
        finally:
            standing.leaving = False

    async def _work(self, function: Callable[[], _Value]) -> _Value:
        return await asyncio.get_running_loop().run_in_executor(self._loader, function)


def _stop_timer(standing: AnyStanding) -> None:
    if standing.timer is not None:
        standing.timer.cancel()
        standing.timer = None


def _check_idle(standing: AnyStanding, wait: bool) -> None:
    if (standing.users or standing.waiting) and not wait:
        raise ApiError(
            409, f"the model {standing.name!r:.200} has requests under way; ask again when "
            "they have ended, or with ?wait=true", "model_in_use",
        )  # fmt: skip


def _mib(size: int) -> str:
    return f"{max(size, 0) / 2**20:,.0f} MiB"


def _embedder(opening: Opening) -> Any:
    from squall.embeddings.model import Embedder

    return Embedder.open_with(opening)


_OPENERS: dict[Kind, Callable[[Opening], Any]] = {
    "text": Model.open_with, "pictures": ImageModel.open_with, "embeddings": _embedder
}  # fmt: skip


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
    give_back()
