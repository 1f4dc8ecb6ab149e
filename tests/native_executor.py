"""A native executor of one checkpoint, with limits as small as tests need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall import executors
from squall.checkpoints.base import ByteTensor, Checkpoint
from squall.executors import CacheType, Limits
from squall.program import Program
from squall.quant import Plan
from squall.weights import WeightStore


def native(  # noqa: PLR0913
    program: Program,
    checkpoint: Checkpoint,
    *,
    blocks: int,
    block_size: int = 16,
    kv_dtype: CacheType = "f16",
    threads: int | None = None,
    weights: str = "packed",
    plan: Plan | None = None,
    keep: Sequence[str] = (),
    max_rows: int = 512,
    max_outputs: int = 64,
) -> Any:
    """See `squall.executors.open`; weights: "f32" computes with exact values."""
    limits = Limits(
        rows={"tokens": max_rows, "outputs": max_outputs, "images": max_rows},
        blocks=blocks,
        block_size=block_size,
        kv_dtype=kv_dtype,
    )
    store = WeightStore(checkpoint, plan=plan, exact=weights == "f32")
    return executors.open(program, store, limits, pool=executors.thread_pool(threads), keep=keep)


def in_memory(weights: Mapping[str, NDArray[np.float32]]) -> Checkpoint:
    """A checkpoint of these tensors, in no file."""
    tensors = {
        name: ByteTensor(name, "f32", w.shape, w.reshape(-1).view(np.uint8))
        for name, w in weights.items()
    }
    return Checkpoint(Path(), {}, tensors, 0)


def opened(
    program: Program,
    checkpoint: Checkpoint,
    rows: Mapping[str, int],
    *,
    plan: str | None = None,
    **limits: Any,
) -> Any:
    """An executor of any program. rows: of each row space, at most."""
    store = WeightStore(checkpoint, plan=Plan.of(plan) if plan else None)
    return executors.open(program, store, Limits(rows=rows, **limits))
