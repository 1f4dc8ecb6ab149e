"""What the parts of a server share: the models, their limits, and whether they are well."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar

from squall.diffusion.model import ImageModel
from squall.errors import InvalidRequest, ModelNotFound, QueueFull
from squall.model import Model
from squall.server.errors import ApiError, stopped
from squall.server.kept import Kept
from squall.server.limits import Bodies
from squall.server.log import Log
from squall.server.metrics import Metrics
from squall.server.options import ServerOptions
from squall.server.pictures import Album
from squall.server.schemas import GenerationBody

# Requests are parsed, rendered and tokenized by so many threads; more would only fight for the GIL.
WORKERS = 2
# Adapters and images are read by so many others, as they may be large, or slow to come.
READERS = 8
# How many more than run and wait may be on their way into the queue or out of it.
SLACK = 32

LOGGER = logging.getLogger("squall.server")

_Value = TypeVar("_Value")


class Standing:
    """How a model that is served is, whatever it makes.

    dead: nothing will be answered any more, for the reason `why_dead`. failed: that was an error.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.created = int(time.time())
        self.dead = asyncio.Event()
        self.why_dead: ApiError | None = None
        self.failed = False

    @property
    def card(self) -> dict[str, Any]:
        """What clients are told of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "local",
            "root": self.name,
            "parent": None,
        }

    def die(self, reason: str, *, failed: bool = True) -> None:
        """Every request for it ends with an error."""
        self.why_dead = self.why_dead or stopped(reason)
        self.failed = self.failed or failed
        self.dead.set()


class Painter(Standing):
    """A model that makes pictures, being served.

    A picture that fails ends no other; and a step may take minutes, so that nobody watches it.
    """

    def __init__(self, name: str, model: ImageModel) -> None:
        super().__init__(name)
        self.model = model

    def drain(self, timeout_s: float) -> bool:
        return self.model.drain(timeout_s)


class Served(Standing):
    """A model that answers in text, being served.

    entering: requests that the engine does not know yet.
    """

    def __init__(self, name: str, model: Model, options: ServerOptions) -> None:
        super().__init__(name)
        self.model = model
        self.model.media = options.media
        self.defaults: dict[str, Any] = {
            "model": name, "truncate_sequence": options.truncate, "seed": options.seed
        }  # fmt: skip
        self.entering: set[object] = set()

    def drain(self, timeout_s: float) -> bool:
        return self.model.engine.drain(timeout_s)

    @property
    def cards(self) -> dict[str, dict[str, Any]]:
        """What clients are told of it and of its adapters, by name."""
        card = self.card | {"max_model_len": self.model.context}
        cards = {self.name: card}
        for info in self.model.adapters.list():
            cards[info.name] = card | {"id": info.name, "root": info.path, "parent": self.name}
        return cards

    def asked(self, body: GenerationBody) -> dict[str, Any]:
        """What holds for a request unless it says otherwise. Raises InvalidRequest."""
        name = body.model
        if name in (None, "default", self.name) or not self.model.adapters.used:
            return self.defaults
        if body.adapters is not None:
            what = f"adapters is for the model {self.name!r:.99}, and {name!r:.99} is one of them"
            raise InvalidRequest(f"{what}; leave one of the fields out")
        return self.defaults | {"model": name, "adapters": name}

    async def watch(self, stall_s: float) -> None:
        engine, loop = self.model.engine, asyncio.get_running_loop()

        def on_death(error: BaseException) -> None:
            LOGGER.error("a step failed", exc_info=error)
            loop.call_soon_threadsafe(self.die, "the engine was stopped by an error in a step")

        engine.on_death = on_death
        while not self.dead.is_set():
            await asyncio.sleep(min(1.0, stall_s / 4))
            stalled_s = engine.stats().stalled_s
            if (lost := getattr(engine.executor, "lost", None)) is not None:
                LOGGER.error(lost)
                self.die(lost)
            if stalled_s > stall_s:
                self.die(f"the engine has not moved for {stalled_s:.0f} s")


class Service:
    """The models being served: those of text, and `painters`, which make pictures.

    active: requests under way. draining: what is there ends, and nothing new is taken; so it is
    after the death of any engine.
    """

    def __init__(self, models: Mapping[str, Model | ImageModel], options: ServerOptions) -> None:
        if not models:
            raise InvalidRequest("there is no model to serve; give one at least")
        self.options = options
        texts = {name: model for name, model in models.items() if isinstance(model, Model)}
        paint = {name: model for name, model in models.items() if isinstance(model, ImageModel)}
        for text, name in product(texts.values(), models):
            text.adapters.reserve(name)
        self.models = {name: Served(name, model, options) for name, model in texts.items()}
        self.painters = {name: Painter(name, model) for name, model in paint.items()}
        self.album = Album(options)
        self.log = Log(options.log)
        self.metrics = Metrics(texts, paint)
        self.bodies = Bodies(options)
        self.kept = Kept(options.kept_responses, options.kept_bytes)
        self.active = 0
        self.draining = False
        configs = [model.engine.config for model in texts.values()]
        self._most_active = SLACK + sum(config.max_seqs + config.max_queue for config in configs)
        self._most_active += sum(1 + model.max_queue for model in paint.values())
        self._workers = ThreadPoolExecutor(WORKERS, "squall-request")
        self._readers = ThreadPoolExecutor(READERS, "squall-reader")

    @property
    def all(self) -> list[Served | Painter]:
        return [*self.models.values(), *self.painters.values()]

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
        return max((served.model.context for served in self.models.values()), default=0)

    def find(self, name: str | None) -> Served:
        """The model that a request for text is for. Raises ApiError."""
        if name in self.painters or not self.models:
            raise ApiError(
                400, f"{name or next(iter(self.painters))!r:.200} makes pictures, not text: POST "
                "/v1/images/generations", "wrong_model", param="model",
            )  # fmt: skip
        if name in self.models:
            return self.models[name]
        if name in (None, "default"):
            return next(iter(self.models.values()))
        sole, options = self.sole, self.options
        named = not options.any_model or options.adapter_folders
        if sole is None or named or sole.model.adapters.used:
            return self.models[self.card(name)["parent"]]  # of an adapter
        return sole

    def painter(self, name: str | None) -> Painter:
        """The model that a request for pictures is for. Raises ApiError."""
        if not self.painters:
            raise ApiError(
                400, "no model here makes pictures; serve one: --image-model", "wrong_model"
            )
        if name in self.painters:
            return self.painters[name]
        if name in self.cards:
            raise ApiError(
                400, f"{name!r:.200} answers in text; those that make pictures: "
                f"{', '.join(map(repr, self.painters)):.500}", "wrong_model", param="model",
            )  # fmt: skip
        first, *others = self.painters.values()
        if name in (None, "default") or (self.options.any_model and not others):
            return first
        self.card(str(name))  # which raises
        return first

    @property
    def cards(self) -> dict[str, dict[str, Any]]:
        """What clients are told of models and adapters, by the names that requests may give."""
        found = dict(chain.from_iterable(s.cards.items() for s in self.models.values()))
        return found | {name: painter.card for name, painter in self.painters.items()}

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
        if self.active > self._most_active:
            raise QueueFull(f"{self.active} requests are under way already", retry_after_s=1)

    def submit(self, function: Callable[[], _Value], *, reads: bool = False) -> Future[_Value]:
        """Run what takes long beside the event loop. reads: adapters or images."""
        return (self._readers if reads else self._workers).submit(function)

    async def run(self) -> None:
        watching = (s.watch(self.options.stall_s) for s in self.models.values())
        await asyncio.gather(self._tidy(), *watching)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(min(self.options.image_age_s / 4, 60.0))
            self.album.tidy()

    def close(self) -> None:
        """End the threads and the log; the model stays open."""
        for threads in (self._workers, self._readers):
            threads.shutdown(wait=False, cancel_futures=True)
        self.album.close()
        self.log.close()
