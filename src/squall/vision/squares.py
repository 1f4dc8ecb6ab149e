"""Pictures for towers of SigLIP's kind: rows of patches, and which of them become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.errors import InvalidCheckpoint
from squall.vision.pixels import Floats, Scale, patches

Int32 = NDArray[np.int32]
Inputs = dict[str, NDArray[np.generic]]
HALF = (0.5, 0.5, 0.5)


def scale(
    processor: Mapping[str, Any], mean: Sequence[float] = HALF, std: Sequence[float] = HALF
) -> Scale:
    """Of a preprocessor_config.json, which must be to resize; by default from -1 to 1."""
    if not processor.get("do_resize", True):
        raise InvalidCheckpoint("do_resize in preprocessor_config.json is false; it must be true")
    return Scale.of(processor, mean, std)


def rows(pictures: Sequence[Floats], patch: int, side: int) -> Inputs:
    """Pictures [3, height, width], each of which sees itself, among side * side positions."""
    grids = [(p.shape[1] // patch, p.shape[2] // patch) for p in pictures]
    sizes = np.array([height * width for height, width in grids])
    ends = np.cumsum(sizes)
    return {
        "patches": np.concatenate([patches(picture, patch) for picture in pictures]),
        "positions": np.concatenate([positions(*grid, side) for grid in grids]),
        "spans": np.stack([ends - sizes, ends]).repeat(sizes, axis=1).astype(np.int32),
    }


def positions(height: int, width: int, side: int) -> Int32:
    """Which of side * side learned positions patches have, by where in their picture they are."""
    edges = ((np.arange(side - 1) + 1.0) * (1 / side)).astype(np.float32)
    line, column = (
        np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
        for count in (height, width)
    )
    most = np.float32(1 - 1e-6)
    line, column = (edges.searchsorted(np.minimum(at, most), "right") for at in (line, column))
    found: Int32 = (line[:, None] * side + column).reshape(-1).astype(np.int32)
    return found


def windows(pictures: int, side: int, size: int) -> Int32:
    """Rows of each square of size * size patches, [size * size, squares]; of one row, [squares]."""
    shape = pictures, side // size, size, side // size, size
    every: Int32 = np.arange(pictures * side**2, dtype=np.int32).reshape(shape)
    found: Int32 = np.ascontiguousarray(every.transpose(2, 4, 0, 1, 3))
    return found.reshape((size**2, -1) if size > 1 else -1)
