"""Rows of a weight, gathered from the tensors of a checkpoint that they lie in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Checkpoint, Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.program import Slice


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows in one number format, uint8 [rows * row_bytes]; `factors` multiply them, if any do."""

    format: str
    data: NDArray[np.uint8]
    factors: NDArray[np.float32] | None


# (tensor, first row, one past the last) -> format and bytes
Read = Callable[[Tensor, int, int], tuple[str, NDArray[np.uint8]]]


def as_stored(tensor: Tensor, start: int, stop: int) -> tuple[str, NDArray[np.uint8]]:
    """Rows as the checkpoint has them."""
    if tensor.order is not None:
        raise UnsupportedModel(f"tensor {tensor.name} has its columns in an order of its own")
    return tensor.format, tensor.row_data(start, stop)


def gather(
    checkpoint: Checkpoint,
    slices: Sequence[Slice],
    first: int,
    last: int,
    cols: int,
    read: Read = as_stored,
) -> Rows:
    """Rows `first` to `last` - 1 of the slices, one after another; a copy only if it must be."""
    parts: list[NDArray[np.uint8]] = []
    factors: list[NDArray[np.float32]] = []
    formats: set[str] = set()
    at = 0
    for part in slices:
        start, stop = max(first, at), min(last, at + part.stop - part.start)
        if start < stop:
            tensor, offset = checkpoint.tensors[part.tensor], part.start - at
            if tensor.cols != cols or stop + offset > tensor.rows:
                raise InvalidCheckpoint(
                    f"tensor {tensor.name} has shape {tensor.shape}, not [{stop + offset}, {cols}]"
                )
            format, data = read(tensor, start + offset, stop + offset)
            parts.append(data)
            formats.add(format)
            factors.append(np.full(stop - start, tensor.factor, np.float32))
        at += part.stop - part.start
    if len(formats) != 1:
        names = ", ".join(part.tensor for part in slices)
        raise UnsupportedModel(f"tensors of one weight differ in format: {names}")
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    scaled = any(factor[0] != 1.0 for factor in factors)
    return Rows(formats.pop(), data, np.concatenate(factors) if scaled else None)
