"""Executors on PyTorch's CPU device, and the same program elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from native_executor import in_memory
from squall import executors
from squall.checkpoints.base import Checkpoint
from squall.executors import Limits, Placement
from squall.executors.devices import Stage
from squall.program import Matrix, Program, Slice, Vector
from squall.quant import Plan
from squall.weights import WeightStore

Array = NDArray[np.float32]
TORCH = Placement((Stage("torch"),))


def on_torch(
    program: Program,
    checkpoint: Checkpoint,
    rows: Mapping[str, int],
    *,
    plan: str | None = None,
    keep: Sequence[str] = (),
    **limits: Any,
) -> Any:
    """As `native_executor.opened`, with one thread: others would wait for each other's CPU."""
    store = WeightStore(checkpoint, plan=Plan.of(plan) if plan else None)
    return executors.open(
        program, store, Limits(rows=rows, **limits), placement=TORCH,
        pool=executors.thread_pool(1), keep=keep,
    )  # fmt: skip


class Weights:
    """Random weights, as ops name them."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.arrays: dict[str, Array] = {}

    def matrix(self, rows: int, cols: int, experts: int = 1) -> Matrix:
        role = f"m{len(self.arrays)}"
        shape = (experts * rows, cols)
        self.arrays[role] = self._rng.normal(0, cols**-0.5, shape).astype(np.float32)
        return Matrix((Slice(role, 0, experts * rows),), rows, cols, experts, role)

    def vector(self, size: int, offset: float = 0.0) -> Vector:
        role = f"v{len(self.arrays)}"
        self.arrays[role] = self._rng.normal(0, 1, size).astype(np.float32)
        return Vector((Slice(role, 0, size),), size, offset, role)

    def checkpoint(self) -> Checkpoint:
        return in_memory(self.arrays)
