"""ggml's formats with blocks of 32 values: q4_0 q4_1 q5_0 q5_1 q8_0 q8_1.

The field order of each dtype is ggml's public block layout. In `_0` formats a value is
scale * (code - middle), in `_1` formats scale * code + minimum. Of packed 4-bit codes, byte i holds
value i in its low half and value i + 16 in its high half; `high` holds the fifth bits, value i's in
bit i of a little-endian 32-bit word.
"""

from __future__ import annotations

from functools import partial
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


def _column(field: NDArray[np.float16]) -> NDArray[np.float32]:
    return field.astype(np.float32)[:, None]


def _decode(middle: int, blocks: NDArray[Any]) -> NDArray[np.float32]:
    """Codes of 4 bits, of 5 where the layout has `high`; plus its `minimum` where it has one."""
    names = blocks.dtype.names or ()
    codes = unpack(blocks["codes"], 4, 16)
    if "high" in names:
        codes |= unpack(blocks["high"], 1, 1) << 4
    values: NDArray[np.float32] = _column(blocks["scale"]) * (codes.astype(np.float32) - middle)
    return values + _column(blocks["minimum"]) if "minimum" in names else values


def _decode_q8(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """q8_1's `sum` (scale times the sum of the codes) only speeds up dot products."""
    return _column(blocks["scale"]) * blocks["codes"].astype(np.float32)


FORMATS = (
    Format("q4_0", 2, 32, np.dtype([_SCALE, _CODES]), partial(_decode, 8)),
    Format("q4_1", 3, 32, np.dtype([_SCALE, _MINIMUM, _CODES]), partial(_decode, 0)),
    Format("q5_0", 6, 32, np.dtype([_SCALE, _HIGH, _CODES]), partial(_decode, 16)),
    Format("q5_1", 7, 32, np.dtype([_SCALE, _MINIMUM, _HIGH, _CODES]), partial(_decode, 0)),
    Format("q8_0", 8, 32, np.dtype([_SCALE, _BYTES]), _decode_q8),
    Format("q8_1", 9, 32, np.dtype([_SCALE, ("sum", "<f2"), _BYTES]), _decode_q8),
)
