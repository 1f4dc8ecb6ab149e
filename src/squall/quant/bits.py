"""Unpacking small unsigned integers from bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unpack(
    packed: NDArray[np.uint8],  # [blocks, bytes]
    bits: int,
    run: int,
) -> NDArray[np.uint8]:
    """Codes of 1, 2 or 4 bits as uint8 [blocks, bytes * 8 // bits].

    Each run of `run` bytes holds 8 // bits groups of `run` codes; the first group sits in the
    lowest bits of the bytes, the last in the highest. A run of 1 is plain little-endian bit order.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    mask = np.uint8((1 << bits) - 1)
    codes: NDArray[np.uint8] = packed.reshape(len(packed), -1, 1, run) >> shifts & mask
    return codes.reshape(len(packed), -1)
