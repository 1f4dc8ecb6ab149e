"""What a model sees with: images become rows for its decoder, which are kept for a while."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from squall import executors
from squall.engine.request import Recalled, Span
from squall.errors import InvalidRequest
from squall.executors import Executor, Limits, Memory
from squall.program import Program
from squall.vision import memory
from squall.vision.family import Family, Processed
from squall.vision.placing import Placed
from squall.vision.qwen import rope_positions
from squall.weights import WeightStore

Floats = NDArray[np.float32]
T = TypeVar("T", Floats, Memory)

LEAST_ROWS, MOST_ROWS = 1024, 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """An image as the model reads it. digest: of its pixels."""

    processed: Processed
    digest: bytes


class Kept:
    """Rows and memories by what they were made of; those used lately, at least the last."""

    def __init__(self, limit_bytes: int) -> None:
        self.nbytes = 0
        self._limit_bytes = limit_bytes
        self._found: OrderedDict[bytes, Floats | Memory] = OrderedDict()

    def get(self, key: bytes, make: Callable[[], T]) -> T:
        """What was made before, or is made now."""
        if key in self._found:
            self._found.move_to_end(key)
            return cast(T, self._found[key])
        found = self._found[key] = make()
        self.nbytes += found.nbytes
        while self.nbytes > self._limit_bytes and len(self._found) > 1:
            _, gone = self._found.popitem(last=False)
            self.nbytes -= gone.nbytes
        return found


class Sight:
    """Reads images with a family's processor and a tower, for the decoder that an executor runs.

    families: for images in full, and with little detail.
    tower, keys: programs of one store; keys makes what the decoder recalls of rows, if it does.
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
        self._decoder, self._store, (self._program, keys) = decoder, store, programs
        indices = {index.name: index.axes for index in decoder.program.indices}
        self._turns = indices.get("rotary", 1) > 1
        self._kept = Kept(limit_bytes)
        # One image is read at a time: two that are the same are read once.
        self._lock = threading.Lock()
        self._rows = 0
        self._tower = self._open(LEAST_ROWS)
        limits = Limits(rows={"image": memory.MOST})
        pool = decoder.pool
        self._keys = None if keys is None else executors.open(keys, store, limits, pool=pool)

    def process(self, image: Image, detail: str = "auto") -> Seen:
        """What is to be read of an upright RGB image."""
        from squall.vision.images import digest

        if detail == "low":
            return Seen(self._low.process(image), digest(image) + b"low")
        return Seen(self.family.process(image), digest(image))

    def fields(self, placed: Placed, images: Sequence[Seen]) -> dict[str, Any]:
        """What a `Request` has of images besides ids; the tower reads those that it has to."""
        if not images:
            return {}
        if self._keys is not None:
            return {"recalled": self._recalled(placed, images)}
        rows = [self.rows(image) for image in images]
        spans = tuple(
            Span(
                run.start, run.stop, images[run.image].digest,
                rows[run.image][run.offset : run.offset + run.stop - run.start],
                self.family.mutual,
            )
            for run in placed.runs
        )  # fmt: skip
        if not self._turns:
            return {"spans": spans}
        grids = [image.processed.grid or (1, 1) for image in images]
        return {"spans": spans, "rotary": rope_positions(len(placed.ids), placed.runs, grids)}

    def memory_digest(self, images: Sequence[Seen]) -> str:
        """Which images a prompt recalls, for `CacheScope`; "" if they stand in the prompt."""
        together = b"".join(image.digest for image in images)
        return hashlib.sha256(together).hexdigest() if images and self._keys is not None else ""

    def rows(self, image: Seen) -> Floats:
        """Rows of an image for the decoder, [rows, hidden]."""
        with self._lock:
            return self._kept.get(image.digest, lambda: self._read(image.processed.inputs))

    def _recalled(self, placed: Placed, images: Sequence[Seen]) -> Recalled:
        processed = [image.processed for image in images]

        def remember() -> Memory:
            assert self._keys is not None
            rows = [self._read(image.inputs) for image in processed]
            ordered = memory.ordered(list(zip(processed, rows, strict=True)))
            return memory.remember(self._keys, self._decoder, ordered)

        with self._lock:
            found = self._kept.get(self.memory_digest(images).encode(), remember)
        return Recalled(found, memory.seen(placed.ids, placed.token, processed))

    def _read(self, inputs: Mapping[str, NDArray[np.generic]]) -> Floats:
        most = max(array.shape[-1 if array.dtype == np.int32 else 0] for array in inputs.values())
        if most > MOST_ROWS:
            raise InvalidRequest(f"an image has {most} patches; at most {MOST_ROWS} are read")
        if most > self._rows:
            self._tower = self._open(1 << (most - 1).bit_length())
        (rows,) = self._tower.run(inputs).values()
        rows.flags.writeable = False
        self.encoded += 1
        return rows

    def _open(self, rows: int) -> Executor:
        """An executor for so many rows of each space; weights are there once."""
        self._rows = rows
        limits = Limits(rows=dict.fromkeys(self._program.spaces, rows))
        return executors.open(self._program, self._store, limits, pool=self._decoder.pool)
