"""Rows of a weight, gathered from the tensors of a checkpoint that they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Checkpoint
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.program import Slice
from squall.quant import FORMATS


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows in one number format, uint8 [rows * row_bytes]; `factors` multiply them, if any do."""

    format: str
    data: NDArray[np.uint8]
    factors: NDArray[np.float32] | None


def gather(
    checkpoint: Checkpoint, slices: Sequence[Slice], first: int, last: int, cols: int
) -> Rows:
    """Rows `first` to `last` - 1 of the slices, one after another; a copy only if it must be."""
    parts: list[NDArray[np.uint8]] = []
    factors: list[NDArray[np.float32]] = []
    formats: set[str] = set()
    at = 0
    for part in slices:
        start, stop = max(first, at), min(last, at + part.stop - part.start)
        if start < stop:
            offset = part.start - at
            parts.append(_rows(checkpoint, part.tensor, start + offset, stop + offset, cols))
            tensor = checkpoint.tensors[part.tensor]
            formats.add(tensor.format)
            factors.append(np.full(stop - start, tensor.factor, np.float32))
        at += part.stop - part.start
    if len(formats) != 1:
        names = ", ".join(part.tensor for part in slices)
        raise UnsupportedModel(f"tensors of one weight differ in format: {names}")
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    scaled = any(factor[0] != 1.0 for factor in factors)
    return Rows(formats.pop(), data, np.concatenate(factors) if scaled else None)


def _rows(checkpoint: Checkpoint, name: str, start: int, stop: int, cols: int) -> NDArray[np.uint8]:
    tensor = checkpoint.tensors[name]
    row_bytes = FORMATS[tensor.format].row_bytes(cols)
    if tensor.cols != cols or stop * row_bytes > tensor.nbytes:
        raise InvalidCheckpoint(f"tensor {name} has shape {tensor.shape}, not [{stop}, {cols}]")
    return tensor.data[start * row_bytes : stop * row_bytes]
