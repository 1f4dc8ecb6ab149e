"""All ranks of a sharded program, run by the NumPy executor in one process."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference_executor import ReferenceExecutor
from squall.batch import Batch
from squall.checkpoints.base import Checkpoint
from squall.executors.sharding import shard
from squall.program import Program
from squall.weights import WeightStore

Array = NDArray[np.float32]


class Lockstep:
    """As many reference executors as there are ranks; each waits for the others' part of a sum."""

    def __init__(self, program: Program, checkpoint: Checkpoint, size: int, **options: Any) -> None:
        store = WeightStore(checkpoint)
        self.programs = [shard(program, store, rank, size) for rank in range(size)]
        self._parts: list[Array] = [np.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=60)
        self._executors = [ReferenceExecutor(part, checkpoint, **options) for part in self.programs]
        for rank, executor in enumerate(self._executors):
            executor.sum = self._sum_of(rank)

    def _sum_of(self, rank: int) -> Any:
        def sum_(x: Array) -> Array:
            self._parts[rank] = x
            self._barrier.wait()
            total = np.sum(self._parts, axis=0, dtype=np.float32)
            self._barrier.wait()
            return total

        return sum_

    def step(self, batch: Batch) -> Array:
        """The first rank's logits."""

        def run(rank: int) -> Mapping[str, Array]:
            executor = self._executors[rank]
            program = executor.program
            try:
                return executor.run(batch.inputs(program.indices, program.inputs), batch)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self._executors)) as threads:
            found: Sequence[Mapping[str, Array]] = list(threads.map(run, range(len(self.programs))))
        assert not any(found[1:])
        return found[0]["logits"]
