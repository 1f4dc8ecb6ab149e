"""What rows of an attention see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Spans = NDArray[np.int32]
"""[2, rows]: the first position that a row sees, and one past the last."""


def any_spans(rng: np.random.Generator, rows: int, keys: int) -> Spans:
    """Long ones, short ones, and some that hold nothing."""
    ends = rng.integers(0, keys + 1, (2, rows)).astype(np.int32)
    ends.sort(axis=0)
    ends[:, ::3] = [[0], [keys]]
    ends[0, 1::4] = ends[1, 1::4]
    return ends
