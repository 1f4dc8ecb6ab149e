"""Noise that is the same on every machine: draws keyed by (seed, place), made normal.

All of it is IEEE arithmetic of float64 that rounds in one way only: + - * / and square roots. The
logarithms of C libraries and of NumPy differ in their last bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_Reals = NDArray[np.float64]
_Words = NDArray[np.uint64]

# P. J. Wichura's algorithm AS 241 (PPND16, Applied Statistics 37, 1988), the quantiles of the
# normal distribution: a numerator and a denominator each, from the highest power down.
_CENTRE = (
    (2509.0809287301227, 33430.57558358813, 67265.7709270087, 45921.95393154987, 13731.69376550946,
     1971.5909503065513, 133.14166789178438, 3.3871328727963665),
    (5226.495278852854, 28729.085735721943, 39307.89580009271, 21213.794301586597,
     5394.196021424751, 687.1870074920579, 42.31333070160091, 1.0),
)  # fmt: skip
_SHOULDER = (
    (0.0007745450142783414, 0.022723844989269184, 0.2417807251774506, 1.2704582524523684,
     3.6478483247632045, 5.769497221460691, 4.630337846156546, 1.4234371107496835),
    (1.0507500716444169e-09, 0.0005475938084995345, 0.015198666563616457, 0.14810397642748008,
     0.6897673349851, 1.6763848301838038, 2.053191626637759, 1.0),
)  # fmt: skip
_TAIL = (
    (2.0103343992922881e-07, 2.7115555687434876e-05, 0.0012426609473880784, 0.026532189526576124,
     0.29656057182850487, 1.7848265399172913, 5.463784911164114, 6.657904643501103),
    (2.0442631033899397e-15, 1.421511758316446e-07, 1.8463183175100548e-05, 0.0007868691311456133,
     0.014875361290850615, 0.1369298809227358, 0.599832206555888, 1.0),
)  # fmt: skip
_LN2 = 0.69314718055994531


def packed(seed: int, channels: int, lines: int, columns: int) -> Floats:
    """Noise of [channels, lines, columns] latents as the transformer has them, see `pack`."""
    noise = normals(seed, channels * lines * columns)
    return pack(noise.reshape(channels, lines, columns).transpose(1, 2, 0))


def pack(latents: Floats) -> Floats:
    """Latents [lines, columns, channels] as rows, one for each 2 x 2 of them, line by line.

    In a row channel follows channel, and in a channel line follows line.
    """
    lines, columns, channels = latents.shape
    cut = latents.reshape(lines // 2, 2, columns // 2, 2, channels)
    return np.ascontiguousarray(cut.transpose(0, 2, 4, 1, 3)).reshape(-1, channels * 4)


def unpack(rows: Floats, lines: int, columns: int) -> Floats:
    """The reverse of `pack`, with a row for each place: [lines * columns, channels]."""
    cut = rows.reshape(lines // 2, columns // 2, -1, 2, 2)
    return np.ascontiguousarray(cut.transpose(0, 3, 1, 4, 2)).reshape(lines * columns, -1)


def normals(seed: int, count: int) -> Floats:
    """So many draws of the normal distribution, that with number i keyed by (seed, i)."""
    return quantiles(uniforms(seed, count)).astype(np.float32)


def uniforms(seed: int, count: int) -> _Reals:
    """Between 0 and 1, and neither of them: 52 bits of what the sampler of tokens draws from."""
    key = _mix(np.array([seed], np.uint64))
    bits = _mix(key ^ np.arange(count, dtype=np.uint64)) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def _mix(x: _Words) -> _Words:
    """SplitMix64's finalizer."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def quantiles(p: _Reals) -> _Reals:
    """What a normally distributed number is below with probability p."""
    q = p - 0.5
    found = q * _ratio(_CENTRE, 0.180625 - q * q)
    far = np.abs(q) > 0.425
    r = np.sqrt(-logarithm(np.where(q < 0, p, 1 - p)[far]))
    outer = np.where(r <= 5, _ratio(_SHOULDER, r - 1.6), _ratio(_TAIL, r - 5))
    found[far] = np.where(q[far] < 0, -outer, outer)
    return found


def logarithm(x: _Reals) -> _Reals:
    """Of positive, finite numbers."""
    m, exponent = np.frexp(x)  # m in [0.5, 1)
    low = m < 0.70710678118654752
    m, exponent = np.where(low, m * 2, m), exponent - low
    s = (m - 1) / (m + 1)
    square, series = s * s, np.zeros_like(s)
    for k in range(21, 0, -2):
        series = series * square + 1 / k
    found: _Reals = exponent * _LN2 + 2 * s * series
    return found


def _ratio(of: tuple[tuple[float, ...], tuple[float, ...]], x: _Reals) -> _Reals:
    above = below = np.zeros_like(x)
    for a, b in zip(*of, strict=True):
        above, below = above * x + a, below * x + b
    found: _Reals = above / below
    return found
