"""What `linear` must compute, in float64, and how far a result is from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 32


def linear(
    x: NDArray[np.floating[Any]],  # [rows, cols]
    weight: NDArray[np.float32],  # [outputs, cols]
) -> NDArray[np.float64]:
    return x.astype(np.float64) @ weight.astype(np.float64).T


def quantize_activations(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """The values the integer kernels see: int8 codes per row and per 32 values.

    A group with a peak above 4.5 times its row's root mean square has a second digit of 1/256.
    """
    groups = x.reshape(len(x), x.shape[1] // GROUP, GROUP)
    peak = np.abs(groups).max(axis=2, keepdims=True)
    scale = peak / np.float32(127)
    steps = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    codes = np.rint(steps)
    digits = np.clip(np.rint((steps - codes) * np.float32(256)), -127, 127)
    fine = peak[..., 0] > 4.5 * np.sqrt(_norms(x) / x.shape[1])[:, None]
    return ((codes + digits / 256 * fine[..., None]) * scale.astype(np.float64)).reshape(x.shape)


def nmse(
    actual: NDArray[np.float32],
    expected: NDArray[np.float64],
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
) -> float:
    """Squared error over the energy that products of this size have.

    Not over the energy of `expected`, which cancellation can make small by chance.
    """
    energy = (_norms(x)[:, None] * _norms(weight)).sum() / max(1, x.shape[1])
    error = np.square(actual - expected).sum()
    return float(error / energy) if energy else float(error)


def relative_error(
    actual: NDArray[np.float32],
    expected: NDArray[np.float64],
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
) -> float:
    """The largest error over |x| |w| / sqrt(cols), the usual size of one product."""
    size = np.sqrt(_norms(x)[:, None] * _norms(weight) / max(1, x.shape[1]))
    error = np.abs(actual - expected)
    return float(np.divide(error, size, out=error.copy(), where=size > 0).max())


def _norms(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared length of each row."""
    return np.square(matrix.astype(np.float64)).sum(axis=1)
