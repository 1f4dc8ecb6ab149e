"""HQQ's optimization as its definition says it, in NumPy and float32, for groups along a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROUP = 64
STEPS = 10


def quantize(
    weight: NDArray[np.float32],  # [rows, cols]
    bits: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Codes [rows, groups, 64], scales and zeros [rows, groups, 1]: (code - zero) * scale."""
    w = weight.reshape(len(weight), -1, GROUP)
    largest = np.float32(2**bits - 1)
    low, high = w.min(axis=2, keepdims=True), w.max(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        scale = np.minimum(largest / (high - low), np.float32(2e4))
    zero, beta, best = -low * scale, 10.0, 1e4
    for _ in range(STEPS):
        codes = np.clip(np.rint(w * scale + zero), 0, largest)
        rest = w - (codes - zero) / scale
        zero = (codes - (w - _shrink(rest, beta)) * scale).mean(axis=2, keepdims=True)
        beta *= 1.01
        error = float(np.abs(rest).mean(dtype=np.float64))
        if error >= best:
            break
        best = error
    return np.clip(np.rint(w * scale + zero), 0, largest), 1 / scale, zero


def _shrink(x: NDArray[np.float32], beta: float) -> NDArray[np.float32]:
    size = np.abs(x)
    with np.errstate(divide="ignore"):
        shrunk: NDArray[np.float32] = np.sign(x) * np.maximum(size - size ** (0.7 - 1) / beta, 0)
    return shrunk.astype(np.float32)
