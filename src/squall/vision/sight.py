"""What a model sees with: images become rows for its decoder, which are kept for a while."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from squall import executors
from squall.engine.request import Span
from squall.errors import InvalidRequest
from squall.executors import Executor, Limits, ThreadPool
from squall.program import Program
from squall.vision.family import Family, Processed
from squall.vision.placing import Placed
from squall.weights import WeightStore

Floats = NDArray[np.float32]

LEAST_ROWS, MOST_ROWS = 1024, 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """An image as the model reads it. digest: of its pixels, and of how they are read."""

    processed: Processed
    digest: bytes


class Sight:
    """Reads images with a family's processor and a tower.

    program: the tower's. limit_bytes: of the rows that are kept, those used lately.
    encoded: how many images the tower has read. reused: how many it did not have to.
    """

    def __init__(
        self,
        family: Family,
        program: Program,
        store: WeightStore,
        *,
        pool: ThreadPool,
        limit_bytes: int,
    ) -> None:
        self.family = family
        self.encoded = self.reused = 0
        self._program, self._store, self._pool = program, store, pool
        self._limit_bytes, self._kept_bytes = limit_bytes, 0
        self._kept: OrderedDict[bytes, Floats] = OrderedDict()
        # One image is read at a time: two that are the same are read once.
        self._lock = threading.Lock()
        self._rows = 0
        self._executor = self._open(LEAST_ROWS)

    def process(self, image: Image) -> Seen:
        """What is to be read of an upright RGB image."""
        from squall.vision.images import digest

        return Seen(self.family.process(image), digest(image))

    def spans(self, placed: Placed, images: Sequence[Seen]) -> tuple[Span, ...]:
        """The images as parts of a prompt."""
        rows = [self.rows(image) for image in images]
        return tuple(
            Span(
                run.start, run.stop, images[run.image].digest,
                rows[run.image][run.offset : run.offset + run.stop - run.start],
                self.family.mutual,
            )
            for run in placed.runs
        )  # fmt: skip

    def rows(self, image: Seen) -> Floats:
        """Rows of an image for the decoder, [rows, hidden]."""
        key = image.digest
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                self.reused += 1
                return found
            found = self._read(image.processed.inputs)
            self.encoded += 1
            self._keep(key, found)
            return found

    def _read(self, inputs: Mapping[str, NDArray[np.generic]]) -> Floats:
        most = max(array.shape[-1 if array.dtype == np.int32 else 0] for array in inputs.values())
        if most > MOST_ROWS:
            raise InvalidRequest(f"an image has {most} patches; at most {MOST_ROWS} are read")
        if most > self._rows:
            self._executor = self._open(1 << (most - 1).bit_length())
        (rows,) = self._executor.run(inputs).values()
        rows.flags.writeable = False
        return rows

    def _open(self, rows: int) -> Executor:
        """An executor for so many rows of each space; weights are there once."""
        self._rows = rows
        limits = Limits(rows=dict.fromkeys(self._program.spaces, rows))
        return executors.open(self._program, self._store, limits, pool=self._pool)

    def _keep(self, key: bytes, rows: Floats) -> None:
        self._kept[key] = rows
        self._kept_bytes += rows.nbytes
        while self._kept_bytes > self._limit_bytes:
            _, gone = self._kept.popitem(last=False)
            self._kept_bytes -= gone.nbytes
