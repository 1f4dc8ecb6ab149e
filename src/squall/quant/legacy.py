"""ggml's formats with blocks of 32 values: q4_0 q4_1 q5_0 q5_1 q8_0 q8_1.

The field order of each dtype is ggml's public block layout. In `_0` formats a value is
scale * (code - middle), in `_1` formats scale * code + minimum. Of packed 4-bit codes, byte i holds
value i in its low half and value i + 16 in its high half; `high` holds the fifth bits, value i's in
bit i of a little-endian 32-bit word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.quant.bits import unpack
from squall.quant.format import Format

_SCALE = ("scale", "<f2")
_MINIMUM = ("minimum", "<f2")
_HIGH = ("high", "u1", 4)
_CODES = ("codes", "u1", 16)
_BYTES = ("codes", "i1", 32)

_Q4_0 = np.dtype([_SCALE, _CODES])
_Q4_1 = np.dtype([_SCALE, _MINIMUM, _CODES])
_Q5_0 = np.dtype([_SCALE, _HIGH, _CODES])
_Q5_1 = np.dtype([_SCALE, _MINIMUM, _HIGH, _CODES])
_Q8_0 = np.dtype([_SCALE, _BYTES])
_Q8_1 = np.dtype([_SCALE, ("sum", "<f2"), _BYTES])


def _column(field: NDArray[np.float16]) -> NDArray[np.float32]:
    return field.astype(np.float32)[:, None]


def _codes4(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return unpack(blocks["codes"], 4, 16).astype(np.float32)


def _codes5(blocks: NDArray[Any]) -> NDArray[np.float32]:
    high = unpack(blocks["high"], 1, 1) << 4
    return (unpack(blocks["codes"], 4, 16) | high).astype(np.float32)


def _decode_q4_0(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _column(blocks["scale"]) * (_codes4(blocks) - 8)


def _decode_q4_1(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _column(blocks["scale"]) * _codes4(blocks) + _column(blocks["minimum"])


def _decode_q5_0(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _column(blocks["scale"]) * (_codes5(blocks) - 16)


def _decode_q5_1(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _column(blocks["scale"]) * _codes5(blocks) + _column(blocks["minimum"])


def _decode_q8(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """q8_1's `sum` (scale times the sum of the codes) only speeds up dot products."""
    return _column(blocks["scale"]) * blocks["codes"].astype(np.float32)


FORMATS = (
    Format("q4_0", 2, 32, _Q4_0, _decode_q4_0),
    Format("q4_1", 3, 32, _Q4_1, _decode_q4_1),
    Format("q5_0", 6, 32, _Q5_0, _decode_q5_0),
    Format("q5_1", 7, 32, _Q5_1, _decode_q5_1),
    Format("q8_0", 8, 32, _Q8_0, _decode_q8),
    Format("q8_1", 9, 32, _Q8_1, _decode_q8),
)
