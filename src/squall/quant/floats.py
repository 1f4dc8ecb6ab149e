"""Plain floats as blocks of one value: f32, f16 (IEEE half), bf16 (the upper half of an f32), and
f8_e4m3.

Who uses f8_e4m3 keeps a factor of a row, or of a tensor, beside it: it ends at 448.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.quant.format import Format


def _decode_float(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return blocks.astype(np.float32)[:, None]


def _decode_bf16(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return (blocks.astype(np.uint32) << 16).view(np.float32)[:, None]


def _encode_bf16(values: NDArray[np.float32]) -> NDArray[Any]:
    """Rounds half to even; a NaN stays a NaN even when its payload sits in the dropped half."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype("<u2")


def _f8_values() -> NDArray[np.float32]:
    """E4M3 without the sign: 4 bits of exponent, 3 of mantissa; the last is NaN, none infinite."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.ldexp(np.where(exponent, 8 + mantissa, mantissa), np.maximum(exponent, 1) - 10)
    values[127] = np.nan
    floats: NDArray[np.float32] = values.astype(np.float32)
    return floats


_F8 = _f8_values()
_F8_TIES = (_F8[:126] + _F8[1:127]) / 2


def _decode_f8(blocks: NDArray[Any]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = np.concatenate([_F8, -_F8])[blocks]
    return values[:, None]


def _encode_f8(values: NDArray[np.float32]) -> NDArray[Any]:
    """Rounds half to even; what is too large becomes the largest, 448."""
    size = np.abs(values)
    code = np.searchsorted(_F8_TIES, size)  # the lower one of a tie
    tie = _F8_TIES[np.minimum(code, 125)] == size
    code = np.where(np.isnan(size), 127, code + (tie & (code % 2 == 1)))
    return (code | np.signbit(values) << 7).astype("u1")


FORMATS = (
    Format("f32", 0, 1, np.dtype("<f4"), _decode_float, lambda values: values.astype("<f4")),
    Format("f16", 1, 1, np.dtype("<f2"), _decode_float, lambda values: values.astype("<f2")),
    Format("bf16", 30, 1, np.dtype("<u2"), _decode_bf16, _encode_bf16),
    Format("f8_e4m3", None, 1, np.dtype("u1"), _decode_f8, _encode_f8),
)
