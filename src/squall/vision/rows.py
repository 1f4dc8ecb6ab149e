"""Pictures of any size as towers read them: rows of patches, and which of them become one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from squall.vision.pixels import Floats, patches

Int32 = NDArray[np.int32]
Inputs = dict[str, NDArray[np.generic]]


def axial_rows(tile: Floats, patch: int, merge: int = 1, window: int = 0) -> Inputs:
    """Patches that turn with line and column: window by window, within those square by square.

    merge: patches of a square's side, which become one row. window: squares of a window's side,
        where there are windows.
    """
    height, width = (side // patch // merge for side in tile.shape[1:])
    square = np.indices((height, width)).reshape(2, -1)
    at = square // (window or max(height, width))
    order = np.argsort(at[0] * width + at[1], kind="stable")
    number = (at[0] * width + at[1])[order]
    inner = np.indices((merge, merge)).reshape(2, 1, -1)
    places = (square[:, order, None] * merge + inner).reshape(2, -1)
    count = places.shape[1]
    rows = np.argsort(order) * merge**2 + np.arange(merge**2)[:, None]
    inputs: Inputs = {
        "patches": patches(tile, patch)[places[0] * width * merge + places[1]],
        "rotary": places.astype(np.int32),
        "spans": np.array([[0], [count]], np.int32).repeat(count, axis=1),
        "merged": (rows if merge > 1 else rows[0]).astype(np.int32),
    }
    if window:
        seen = [np.searchsorted(number, number, side) for side in ("left", "right")]
        spans = np.stack(seen).repeat(merge**2, axis=1) * merge**2
        inputs["local"] = spans.astype(np.int32)
    return inputs


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
