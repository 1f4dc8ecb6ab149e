"""Pictures of any size, whose patches turn with their line and column in a tower."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from squall.vision.pixels import Floats, patches


def axial_rows(
    tile: Floats, patch: int, merge: int = 1, window: int = 0
) -> dict[str, NDArray[np.generic]]:
    """Patches as a tower reads them, window by window, and within those square by square.

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
    inputs: dict[str, NDArray[np.generic]] = {
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
