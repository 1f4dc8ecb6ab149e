"""The kinds of models that are served: of text, of pictures, of embeddings."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from squall.adapters.shelf import Adapters, Info
from squall.diffusion.model import ImageModel
from squall.engine.engine import Engine, EngineConfig
from squall.engine.memory import DEFAULT_CONTEXT
from squall.errors import InvalidRequest, QueueFull
from squall.model import Model
from squall.opening import Opening
from squall.server.options import ServerOptions
from squall.server.residence import Lazy, Standing
from squall.server.schemas import GenerationBody

# Requests for models of pictures that are not loaded, and for those of embeddings.
MOST_PICTURES = 16
MOST_TEXTS = 256

LOGGER = logging.getLogger("squall.server")


class Painter(Standing[ImageModel]):
    """A model that makes pictures, being served.

    A picture that fails ends no other; and a step may take minutes, so that nobody watches it.
    """

    kind = "pictures"

    @property
    def most(self) -> int:
        return 1 + (self.model.max_queue if self.ready else MOST_PICTURES)


class Encoder(Standing[Any]):
    """A model that makes embeddings, being served: an `Embedder`, whose calls queue."""

    kind = "embeddings"

    @property
    def most(self) -> int:
        return MOST_TEXTS


@dataclass
class _Left:
    """What clients made of a model until it was unloaded: it is so again when it is loaded.

    isq: what its weights were quantized to, if they were.
    """

    adapters: Sequence[Info] = ()
    active: Mapping[str, float] = field(default_factory=dict)
    isq: tuple[str | int | None, ...] = ()

    def restore(self, model: Model) -> None:
        shelf = model.adapters
        for name in {info.name for info in shelf.list()} - {info.name for info in self.adapters}:
            shelf.remove(name)
        found = {info.name: info.digest for info in shelf.list()}
        for info in self.adapters:
            if found.get(info.name) != info.digest:
                shelf.load(info.name, info.path, pinned=info.pinned)
        shelf.activate(self.active)
        for isq in self.isq:
            model.re_isq(isq)


class Served(Standing[Model]):
    """A model that answers in text, being served.

    entering: requests that the engine does not know yet.
    """

    kind = "text"

    def __init__(
        self, name: str, lazy: Lazy | None, model: Model | None, options: ServerOptions
    ) -> None:
        super().__init__(name, lazy, model)
        self.defaults: dict[str, Any] = {
            "model": name, "truncate_sequence": options.truncate, "seed": options.seed
        }  # fmt: skip
        self.entering: set[object] = set()
        self.reserved: Collection[str] = (name,)
        self._media, self._stall_s = options.media, options.stall_s
        self._config = EngineConfig()
        self._context: int | None = None
        self._left = _Left()
        opening = None if lazy is None else lazy.open
        if isinstance(opening, Opening) and opening.adapters and not opening.merge:
            known = {name: os.fspath(path) for name, path in opening.adapters.items()}
            self._left = _Left([Info(*named, "", 0, 0, False, False) for named in known.items()])
        self._watching: asyncio.Task[None] | None = None

    @property
    def most(self) -> int:
        config = self.model.engine.config if self.ready else self._config
        return config.max_seqs + config.max_queue

    @property
    def context(self) -> int:
        """Of the model, as long as it was loaded once."""
        return self.model.context if self.ready else self._context or DEFAULT_CONTEXT

    @property
    def infos(self) -> Sequence[Info]:
        """Its adapters; while it is not loaded, those that it will have."""
        return self.model.adapters.list() if self.ready else self._left.adapters

    @property
    def adapts(self) -> bool:
        """Whether names of requests could be meant for adapters."""
        return self.model.adapters.used if self.ready else bool(self._left.adapters)

    def has(self, adapters: Adapters | None) -> bool:
        """Whether nothing of them is to be read first."""
        return self.ready and self.model.adapters.ready(adapters)

    @property
    def cards(self) -> dict[str, dict[str, Any]]:
        """What clients are told of it and of its adapters, by name."""
        known = self.ready or self._context is not None
        card = self.card | ({"max_model_len": self.context} if known else {})
        cards = {self.name: card}
        for info in self.infos:
            cards[info.name] = card | {"id": info.name, "root": info.path, "parent": self.name}
        return cards

    def asked(self, body: GenerationBody) -> dict[str, Any]:
        """What holds for a request unless it says otherwise. Raises InvalidRequest."""
        name = body.model
        if name in (None, "default", self.name) or not self.adapts:
            return self.defaults
        if body.adapters is not None:
            what = f"adapters is for the model {self.name!r:.99}, and {name!r:.99} is one of them"
            raise InvalidRequest(f"{what}; leave one of the fields out")
        return self.defaults | {"model": name, "adapters": name}

    def check_room(self) -> None:
        """Raises QueueFull if those on their way take all places."""
        others = len(self.entering)
        if self.ready:
            self.model.engine.check_room(others=others)
        elif others >= self.most:
            raise QueueFull(f"{others} requests wait for the model to be loaded", retry_after_s=5)

    def sizes(self, model: Model) -> tuple[int, int]:
        return model.executor.weight_bytes, model.executor.kv_bytes

    def introduce(self, model: Model) -> None:
        """Tell it what it must know of the server."""
        model.media = self._media
        for name in self.reserved:
            model.adapters.reserve(name)

    def prepare(self, model: Model) -> None:
        self.introduce(model)
        if self.loads:
            self._left.restore(model)
        model.grammars.warm()

    def re_isq(self, isq: str | int | None) -> None:
        """Quantize the weights again, and those that are loaded later."""
        self.model.re_isq(isq)
        self._left.isq, self.about = (isq,), None

    def take(self, model: Model) -> None:
        super().take(model)
        self._context, self._config = model.context, model.engine.config
        self.begin()

    def begin(self) -> None:
        """Watch the engine from now on."""
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch(self.model.engine))

    def give(self) -> Model:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        self.model.engine.on_death = None
        shelf = self.model.adapters
        self._left = replace(self._left, adapters=shelf.list(), active=shelf.weights)
        return super().give()

    async def _watch(self, engine: Engine) -> None:
        loop = asyncio.get_running_loop()

        def on_death(error: BaseException) -> None:
            LOGGER.error("a step failed", exc_info=error)
            loop.call_soon_threadsafe(self.die, "the engine was stopped by an error in a step")

        engine.on_death = on_death
        while not self.dead.is_set():
            await asyncio.sleep(min(1.0, self._stall_s / 4))
            stalled_s = engine.stats().stalled_s
            if (lost := getattr(engine.executor, "lost", None)) is not None:
                LOGGER.error(lost)
                self.die(lost)
            if stalled_s > self._stall_s:
                self.die(f"the engine has not moved for {stalled_s:.0f} s")
