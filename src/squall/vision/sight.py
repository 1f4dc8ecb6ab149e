"""What a model sees with: images become rows for its decoder, which are kept for a while."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from squall import executors
from squall.batch import Mixture
from squall.engine.request import CacheScope, Recalled, Span
from squall.errors import InvalidRequest
from squall.executors import Adapter, Executor, Limits, Memory
from squall.program import Program, Site, sites
from squall.quant import Plan
from squall.vision.family import Family, Processed
from squall.vision.images import digest
from squall.vision.placing import Placed
from squall.vision.qwen import rope_positions
from squall.weights import Term, WeightStore

Floats = NDArray[np.float32]
T = TypeVar("T", Floats, Memory)

LEAST_ROWS, MOST_ROWS = 1024, 1 << 16
MOST_AT_ONCE = 512  # rows that a memory is made of
_ANYONE = CacheScope()


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """An image as the model reads it. digest: of its pixels."""

    processed: Processed
    digest: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """An adapter for every program of a model that sees."""

    decoder: Adapter
    tower: Adapter
    keys: Adapter | None

    @property
    def nbytes(self) -> int:
        more = 0 if self.keys is None else self.keys.nbytes
        return self.decoder.nbytes + self.tower.nbytes + more


Adapting = Sequence[tuple[Adapted, float]]


class Kept:
    """Rows and memories by what they were made of; those used lately, at least the last."""

    def __init__(self, limit_bytes: int) -> None:
        self.nbytes = 0
        self._limit_bytes = limit_bytes
        self._found: OrderedDict[bytes, Floats | Memory] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: bytes) -> Floats | Memory | None:
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def get(self, key: bytes, make: Callable[[], T]) -> T:
        if (known := self.find(key)) is not None:
            return cast(T, known)
        made = make()
        with self._lock:
            self._found[key] = made
            self.nbytes += made.nbytes
            while self.nbytes > self._limit_bytes and len(self._found) > 1:
                _, gone = self._found.popitem(last=False)
                self.nbytes -= gone.nbytes
        return made


class Sight:
    """Reads images with a family's processor and a tower, for the decoder that an executor runs.

    families: for images in full, and with little detail.
    programs: of the tower, and of keys and values for the decoder's memory, if it recalls.
    limit_bytes: of what is kept. encoded: how many images the tower has read.
    """

    def __init__(
        self,
        families: tuple[Family, Family],
        decoder: Executor,
        store: WeightStore,
        programs: tuple[Program, Program | None],
        *,
        limit_bytes: int,
    ) -> None:
        self.family, self._low = families
        self.encoded = 0
        self._decoder, (self._program, self._key_program) = decoder, programs
        self._turns = any(i.name == "rotary" and i.axes > 1 for i in decoder.program.indices)
        self._indices = self._program.indices
        self._mixtures = [i for i in self._indices if i.name.startswith("mixture")]
        self._limit_bytes = limit_bytes
        # One image is read at a time: two that are the same are read once.
        self._lock = threading.RLock()
        self._use(store, *self._opened(store))

    def replanned(self, plan: Plan) -> Callable[[], None]:
        """Its weights by another plan; what this gives makes it see with them."""
        store = self._store.replanned(plan)
        return partial(self._use, store, *self._opened(store))

    def _opened(self, store: WeightStore) -> tuple[Executor, Executor | None]:
        keys, limits = self._key_program, Limits(rows={"image": MOST_AT_ONCE})
        tower = self._open(store, LEAST_ROWS)
        return tower, None if keys is None else self._beside(keys, store, limits)

    def _beside(self, program: Program, store: WeightStore, limits: Limits) -> Executor:
        """An executor where the decoder begins."""
        decoder = self._decoder
        return executors.open(
            program, store, limits, placement=decoder.placement.first, pool=decoder.pool
        )

    def _use(self, store: WeightStore, tower: Executor, keys: Executor | None) -> None:
        with self._lock:
            self._store, self._tower, self._keys = store, tower, keys
            self._kept, self._rows = Kept(self._limit_bytes), LEAST_ROWS
            # What other weights made of an image is found in no prefix.
            self._version = os.urandom(8)

    def process(self, image: Image, detail: str = "auto") -> Seen:
        """What is to be read of an upright RGB image."""
        if detail == "low":
            return Seen(self._low.process(image), digest(image) + b"low")
        return Seen(self.family.process(image), digest(image))

    def adapter(self, terms: Mapping[Site, Term]) -> Adapted:
        made, rest = [], dict(terms)
        for executor in (self._tower, self._keys):
            if executor is None:
                continue
            places = {site for op in executor.program.ops for site in sites(op)}
            made.append(executor.adapter({site: rest.pop(site) for site in places & rest.keys()}))
        tower, *keys = made
        return Adapted(self._decoder.adapter(rest), tower, keys[0] if keys else None)

    def fields(
        self, placed: Placed | None, images: Sequence[Seen], adapters: Adapting, scope: CacheScope
    ) -> dict[str, Any]:
        """What a `Request` has of images besides ids; the tower reads those that it has to.

        adapters: with their weights, for which the scope stands.
        """
        decoder = tuple((adapter.decoder, weight) for adapter, weight in adapters)
        found = {"adapters": decoder, "scope": scope}
        if placed is None:
            return found
        version = self._version
        if self._keys is not None:
            together = b"".join([version, *(image.digest for image in images)])
            own = replace(scope, memory=hashlib.sha256(together).hexdigest())
            found |= {"scope": own, "recalled": self._recalled(placed, images, adapters, own)}
        else:
            rows = [self.rows(image, adapters, scope) for image in images]
            found["spans"] = tuple(
                Span(
                    run.start, run.stop, images[run.image].digest + version,
                    rows[run.image][run.offset : run.offset + run.stop - run.start],
                    self.family.mutual,
                )
                for run in placed.runs
            )  # fmt: skip
        if self._turns:
            grids = [image.processed.grid or (1, 1) for image in images]
            found["rotary"] = rope_positions(len(placed.ids), placed.runs, grids)
        # The weights may have changed meanwhile.
        return found if version is self._version else self.fields(placed, images, adapters, scope)

    def rows(self, image: Seen, adapters: Adapting = (), scope: CacheScope = _ANYONE) -> Floats:
        """Rows of an image for the decoder, [rows, hidden], which are kept for that scope."""
        # Nor may anyone find out, by how long it takes, what images others have sent.
        key = image.digest + repr(replace(scope, memory="")).encode()
        return self._once(key, lambda: self._read(image.processed.inputs, adapters))

    def _once(self, key: bytes, make: Callable[[], T]) -> T:
        """What is kept does not wait for others' images."""
        if (known := self._kept.find(key)) is not None:
            return cast(T, known)
        with self._lock:
            return self._kept.get(key, make)

    def _recalled(
        self, placed: Placed, images: Sequence[Seen], adapters: Adapting, scope: CacheScope
    ) -> Recalled:
        processed = [image.processed for image in images]
        mixture = tuple((adapter.keys, weight) for adapter, weight in adapters)

        def make() -> Memory:
            assert self._keys is not None
            rows = [self.rows(image, adapters, scope) for image in images]
            every = ordered(list(zip(processed, rows, strict=True)))
            return remember(self._keys, self._decoder, every, mixture)

        found = self._once(repr(scope).encode(), make)
        return Recalled(found, seen(placed.ids, placed.token, processed))

    def _read(self, inputs: Mapping[str, NDArray[np.generic]], adapters: Adapting) -> Floats:
        """The tower's rows; the lock is held."""
        most = max(array.shape[-1 if array.dtype == np.int32 else 0] for array in inputs.values())
        if most > MOST_ROWS:
            raise InvalidRequest(f"an image has {most} patches; at most {MOST_ROWS} are read")
        if most > self._rows:
            self._rows = 1 << (most - 1).bit_length()
            self._tower = self._open(self._store, self._rows)
        mixtures = (tuple((one.tower, weight) for one, weight in adapters),) if adapters else ()
        sizes = {i.rows: inputs[i.name].shape[-1] for i in self._indices if i.name in inputs}
        given = {
            i.name: np.full(sizes[i.rows], len(mixtures) - 1, np.int32) for i in self._mixtures
        }
        (rows,) = self._tower.run({**inputs, **given}, mixtures=mixtures, patient=True).values()
        rows.flags.writeable = False
        self.encoded += 1
        return rows

    def _open(self, store: WeightStore, rows: int) -> Executor:
        """An executor for so many rows of each space; weights are there once."""
        limits = Limits(rows=dict.fromkeys(self._program.spaces, rows))
        return self._beside(self._program, store, limits)


def ordered(images: Sequence[tuple[Processed, Floats]]) -> Floats:
    """The rows of all images, and after them those of what fills them up."""
    cut = [np.split(rows, [(image.recalled or (0,))[0]]) for image, rows in images]
    return np.concatenate([rows for part in zip(*cut, strict=True) for rows in part])


def seen(ids: Sequence[int], token: int, images: Sequence[Processed]) -> NDArray[np.int32]:
    """What tokens see of the memory, as `Batch.seen` has it; images stand where the `token` is.

    They see the last image before them, with those right before that one, and none after it.
    Tokens without an image before them see all, and what fills images up.
    """
    sizes = [image.recalled or (0, 0) for image in images]
    ends = np.cumsum([0, *(size[0] for size in sizes)])
    found = np.zeros((3, len(ids)), np.int32)
    found[1] = sum(map(sum, sizes))
    first = 0
    for image, at in enumerate(at for at, id_ in enumerate(ids) if id_ == token):
        first = first if at and ids[at - 1] == token else image
        found[:, at:] = [[ends[first]], [ends[image + 1]], [1]]
    return found


def remember(keys: Executor, decoder: Executor, rows: Floats, mixture: Mixture = ()) -> Memory:
    """A memory of the decoder's. keys: runs `decoder.compile_memory`. mixture: of its adapters."""
    memory = decoder.memory(len(rows))
    for start in range(0, len(rows), MOST_AT_ONCE):
        part = rows[start : start + MOST_AT_ONCE]
        chosen = np.full(len(part), 0 if mixture else -1, np.int32)
        given = {"image": part, "mixture.image": chosen}
        made = list(keys.run(given, mixtures=(mixture,) if mixture else (), patient=True).values())
        memory.write(start, made[::2], made[1::2])
    return memory
