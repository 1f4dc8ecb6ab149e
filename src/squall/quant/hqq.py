"""HQQ: blocks of 64 values along a row, whose zero point is fitted to what rounding leaves.

A value is scale * code + minimum. `minimum` is where the zero point, a float, puts code 0; codes of
8 bits are signed, so there it is the middle. Codes of 3 bits are two fields, `low | high << 2`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.quant.bits import unpack
from squall.quant.format import Format

GROUP = 64
_SCALES = [("scale", "<f2"), ("minimum", "<f2")]


def _layout(bits: int) -> np.dtype[Any]:
    if bits == 8:
        return np.dtype([*_SCALES, ("codes", "i1", GROUP)])
    high = [("high", "u1", GROUP // 8)] if bits == 3 else []
    return np.dtype([*_SCALES, ("codes", "u1", GROUP * (bits & ~1 or 1) // 8), *high])


def _values(blocks: NDArray[Any], codes: NDArray[Any]) -> NDArray[np.float32]:
    scale, minimum = (blocks[name].astype(np.float32)[:, None] for name in ("scale", "minimum"))
    return scale * codes.astype(np.float32) + minimum


def _decode_hqq8(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _values(blocks, blocks["codes"])


def _decode_hqq4(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _values(blocks, unpack(blocks["codes"], 4, 32))


def _decode_hqq3(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _values(blocks, unpack(blocks["codes"], 2, 16) | unpack(blocks["high"], 1, 8) << 2)


def _decode_hqq2(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _values(blocks, unpack(blocks["codes"], 2, 16))


def _decode_hqq1(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return _values(blocks, unpack(blocks["codes"], 1, 8))


FORMATS = (
    Format("hqq8", None, GROUP, _layout(8), _decode_hqq8),
    Format("hqq4", None, GROUP, _layout(4), _decode_hqq4),
    Format("hqq3", None, GROUP, _layout(3), _decode_hqq3),
    Format("hqq2", None, GROUP, _layout(2), _decode_hqq2),
    Format("hqq1", None, GROUP, _layout(1), _decode_hqq1),
)
