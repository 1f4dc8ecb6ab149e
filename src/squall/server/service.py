"""What the parts of a server share: the models, their limits, and whether they are well."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from squall.about import UNKNOWN, About
from squall.diffusion.model import ImageModel
from squall.errors import InvalidRequest, ModelNotFound, QueueFull, SquallError
from squall.model import Model
from squall.server.errors import ApiError, stopped
from squall.server.kept import Kept
from squall.server.limits import Bodies
from squall.server.log import Log
from squall.server.metrics import Metrics
from squall.server.options import ServerOptions
from squall.server.pictures import Album
from squall.server.residence import AnyStanding, Lazy, Residence
from squall.server.served import Encoder, Painter, Served

if TYPE_CHECKING:
    from squall.server.gate import Visit

# Requests are parsed, rendered and tokenized by so many threads; more would only fight for the GIL.
WORKERS = 2
# Adapters and images are read by so many others, as they may be large, or slow to come.
READERS = 8
# How many more than run and wait may be on their way into the queue or out of it.
SLACK = 32

# What kinds of models do, and where those are asked that answer in no text.
_DOES = {
    "text": "answers in text", "pictures": "makes pictures", "embeddings": "makes embeddings"
}  # fmt: skip
_WHERE = {"pictures": "/v1/images/generations", "embeddings": "/v1/embeddings"}

Open = Model | ImageModel | Any
"""A model that is open: of text, of pictures, or an `Embedder`."""
Models = Open | Mapping[str, Open | Lazy]

_Value = TypeVar("_Value")
_Other = TypeVar("_Other", Painter, Encoder)


class Service:
    """The models being served: those of text, `painters`, which make pictures, and `encoders`.

    active: requests under way. draining: what is there ends, and nothing new is taken; so it is
    after the death of any engine.
    """

    def __init__(self, models: Mapping[str, Open | Lazy], options: ServerOptions) -> None:
        """models: open ones, and `Lazy` ones, by name."""
        if not models:
            raise InvalidRequest("there is no model to serve; give one at least")
        self.options = options
        self.models: dict[str, Served] = {}
        self.painters: dict[str, Painter] = {}
        self.encoders: dict[str, Encoder] = {}
        for name, given in models.items():
            self._add(name, given)
        self._introduce()
        self.residence = Residence(self.all, options.memory_bytes)
        self.album = Album(options)
        self.log = Log(options.log)
        self.metrics = Metrics(self.models, self.painters, lambda: self.all)
        self.bodies = Bodies(options)
        self.kept = Kept(options.kept_responses, options.kept_bytes)
        self.active = 0
        self.draining = False
        self._workers = ThreadPoolExecutor(WORKERS, "squall-request")
        self._readers = ThreadPoolExecutor(READERS, "squall-reader")

    def add(self, name: str, lazy: Lazy) -> None:
        """Serve one more, if nothing has its name."""
        if name not in self.cards:
            self._add(name, lazy)
            self._introduce()
            self.residence.standings[:] = self.all

    def forget(self, standing: AnyStanding) -> None:
        """Serve a model no more that is not loaded."""
        for models in (self.models, self.painters, self.encoders):
            models.pop(standing.name, None)
        self.residence.standings[:] = self.all

    def _introduce(self) -> None:
        names = tuple(standing.name for standing in self.all)
        for served in self.models.values():
            served.reserved = names
            if served.ready:
                served.introduce(served.model)

    def _add(self, name: str, given: Any) -> None:
        lazy = given if isinstance(given, Lazy) else None
        model = given if lazy is None else None
        kind = "pictures" if isinstance(given, ImageModel) else "embeddings"
        kind = lazy.kind if lazy is not None else "text" if isinstance(given, Model) else kind
        if kind == "text":
            self.models[name] = Served(name, lazy, model, self.options)
        elif kind == "pictures":
            self.painters[name] = Painter(name, lazy, model)
        else:
            self.encoders[name] = Encoder(name, lazy, model)

    @property
    def all(self) -> list[AnyStanding]:
        return [*self.models.values(), *self.painters.values(), *self.encoders.values()]

    @property
    def sole(self) -> Served | None:
        """The only model of text."""
        return next(iter(self.models.values())) if len(self.models) == 1 else None

    @property
    def why_dead(self) -> ApiError | None:
        reasons = (served.why_dead for served in self.all)
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def failed(self) -> list[Served]:
        return [served for served in self.models.values() if served.failed]

    @property
    def context(self) -> int:
        return max((served.context for served in self.models.values()), default=0)

    def find(self, name: str | None) -> Served:
        """The model that a request for text is for. Raises ApiError."""
        others: dict[str, AnyStanding] = {**self.painters, **self.encoders}
        if name in others or not self.models:
            other = others[name] if name in others else next(iter(others.values()))
            raise ApiError(
                400, f"{name or other.name!r:.200} {_DOES[other.kind]}, not text: POST "
                f"{_WHERE[other.kind]}", "wrong_model", param="model",
            )  # fmt: skip
        if name in self.models:
            return self.models[name]
        if name in (None, "default"):
            return next(iter(self.models.values()))
        sole, options = self.sole, self.options
        named = not options.any_model or options.adapter_folders
        if sole is None or named or sole.adapts:
            return self.models[self.card(name)["parent"]]  # of an adapter
        return sole

    def painter(self, name: str | None) -> Painter:
        """The model that a request for pictures is for. Raises ApiError."""
        return self._other(name, self.painters, "pictures", "--image-model")

    def embedder(self, name: str | None) -> Encoder:
        """The model that a request for embeddings is for. Raises ApiError."""
        return self._other(name, self.encoders, "embeddings", "squall serve MODEL")

    def _other(self, name: str | None, those: Mapping[str, _Other], what: str, how: str) -> _Other:
        if not those:
            raise ApiError(400, f"no model here makes {what}; serve one: {how}", "wrong_model")
        if name is not None and name in those:
            return those[name]
        if name in (cards := self.cards):
            raise ApiError(
                400, f"{name!r:.200} {_DOES[cards[name]['kind']]}; those that make {what}: "
                f"{', '.join(map(repr, those)):.500}", "wrong_model", param="model",
            )  # fmt: skip
        first, *others = those.values()
        if name in (None, "default") or (self.options.any_model and not others):
            return first
        self.card(str(name))  # which raises
        return first

    async def use(self, standing: AnyStanding, visit: Visit) -> None:
        """The request has the model until it is over; it is loaded first. Raises ApiError."""
        if visit.using not in (None, standing):
            visit.leave()
        visit.using = standing
        await self.residence.use(standing, visit)

    async def preload(self) -> None:
        """Load what is to be there from the start. Raises ApiError."""
        for standing in self.all:
            if standing.lazy is not None and (standing.lazy.pinned or standing.lazy.preload):
                await self.residence.load(standing)

    async def load(self, name: str) -> AnyStanding:
        """The model, or that of an adapter, loaded. Raises ApiError."""
        standing = self.standing(name)
        self.check_ready()
        await self.residence.load(standing)
        return standing

    async def unload(self, name: str, *, wait: bool = False) -> AnyStanding:
        """The model, no longer loaded. Raises ApiError, also if it is used, unless `wait`."""
        standing = self.standing(name)
        await self.residence.unload(standing, wait=wait)
        return standing

    def standing(self, name: str) -> AnyStanding:
        """The model of this name, or that of an adapter. Raises ApiError."""
        card = self.card(name)
        named = card["parent"] or name
        return next(standing for standing in self.all if standing.name == named)

    async def learn(self, standing: AnyStanding) -> About:
        """What a model is; of one that is not loaded, what headers say."""
        if standing.about is None:
            found, loads = self.submit(standing.look, reads=True), standing.loads
            with suppress(SquallError, OSError):
                about = await asyncio.wrap_future(found)
                standing.about = about if standing.loads == loads else None
        return standing.about or UNKNOWN[standing.kind]

    async def learned(self) -> dict[str, dict[str, Any]]:
        """`cards`, with what all of them are."""
        for standing in self.all:
            await self.learn(standing)
        return self.cards

    @property
    def cards(self) -> dict[str, dict[str, Any]]:
        """What clients are told of models and adapters, by the names that requests may give."""
        return dict(chain.from_iterable(standing.cards.items() for standing in self.all))

    def card(self, name: str) -> dict[str, Any]:
        """The one with this name. Raises ApiError."""
        cards = self.cards
        if name not in cards:
            raise ApiError(
                404, f"there is no model {name!r:.200}; this server has "
                f"{', '.join(map(repr, cards)):.500}", "model_not_found", param="model",
            )  # fmt: skip
        return cards[name]

    def adapter_path(self, path: str) -> str:
        """Where `path` is in the allowed folders. Raises ApiError, and ModelNotFound."""
        folders = [folder.resolve() for folder in self.options.adapter_folders]
        places = [(Path(os.path.realpath(folder / path)), folder) for folder in folders]
        allowed = [place for place, folder in places if place.is_relative_to(folder)]
        if not allowed:
            raise self.not_allowed
        if found := next(filter(os.path.exists, allowed), None):
            return str(found)
        raise ModelNotFound(f"there is no adapter at {path!r:.200}; give its folder or file")

    @property
    def not_allowed(self) -> ApiError:
        return ApiError(
            403, "adapters come only from folders that the server was started with: "
            "--adapter-folder FOLDER", "adapter_not_allowed",
        )  # fmt: skip

    def check_ready(self) -> None:
        """Raises ApiError if nothing new can be answered."""
        if self.why_dead is not None:
            raise self.why_dead
        if self.draining:
            raise stopped("the server is shutting down; ask another one")

    def check_room(self) -> None:
        """Raises QueueFull, before anything of a request is read, if far too many are there."""
        if self.active > SLACK + sum(standing.most for standing in self.all):
            raise QueueFull(f"{self.active} requests are under way already", retry_after_s=1)

    def submit(self, function: Callable[[], _Value], *, reads: bool = False) -> Future[_Value]:
        """Run what takes long beside the event loop. reads: adapters or images."""
        return (self._readers if reads else self._workers).submit(function)

    async def run(self) -> None:
        for served in self.models.values():
            if served.ready:
                served.begin()
        await self._tidy()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(min(self.options.image_age_s / 4, 60.0))
            self.album.tidy()

    async def close(self) -> None:
        """End the threads and the log; models that were not opened here stay open."""
        await self.residence.close()
        for threads in (self._workers, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        self.album.close()
        self.log.close()
