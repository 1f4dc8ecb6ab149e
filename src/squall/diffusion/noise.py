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
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4,
     4.5921953931549871457e4, 1.3731693765509461125e4, 1.9715909503065514427e3,
     1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4,
     2.1213794301586595867e4, 5.3941960214247511077e3, 6.8718700749205790830e2,
     4.2313330701600911252e1, 1.0),
)  # fmt: skip
_SHOULDER = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
     1.27045825245236838258e0, 3.64784832476320460504e0, 5.76949722146069140550e0,
     4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
     1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0,
     2.05319162663775882187e0, 1.0),
)  # fmt: skip
_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3,
     2.65321895265761230930e-2, 2.96560571828504891230e-1, 1.78482653991729133580e0,
     5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5,
     7.86869131145613259100e-4, 1.48753612908506148525e-2, 1.36929880922735805310e-1,
     5.99832206555887937690e-1, 1.0),
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
