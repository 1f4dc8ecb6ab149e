"""HQQ: blocks of 64 values along a row, whose zero point is fitted to what rounding leaves.

A value is scale * code + minimum. `minimum` is where the zero point, a float, puts code 0; codes of
8 bits are signed, so there it is the middle. Codes of 3 bits are two fields, `low | high << 2`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.quant.bits import unpack
from squall.quant.format import Format

GROUP = 64
RUN = {4: 32, 3: 16, 2: 16, 1: 8}  # bytes of codes, as `unpack` has them, by bits
_SCALES = [("scale", "<f2"), ("minimum", "<f2")]


def _layout(bits: int) -> np.dtype[Any]:
    if bits == 8:
        return np.dtype([*_SCALES, ("codes", "i1", GROUP)])
    high = [("high", "u1", GROUP // 8)] if bits == 3 else []
    return np.dtype([*_SCALES, ("codes", "u1", GROUP * (bits & ~1 or 1) // 8), *high])


def _decode(bits: int, blocks: NDArray[Any]) -> NDArray[np.float32]:
    codes = blocks["codes"]
    if bits != 8:
        codes = unpack(codes, 2 if bits == 3 else bits, RUN[bits])
    if bits == 3:
        codes = codes | unpack(blocks["high"], 1, RUN[1]) << 2
    scale, minimum = (blocks[name].astype(np.float32)[:, None] for name in ("scale", "minimum"))
    values: NDArray[np.float32] = scale * codes.astype(np.float32) + minimum
    return values


FORMATS = tuple(
    Format(f"hqq{bits}", None, GROUP, _layout(bits), partial(_decode, bits))
    for bits in (8, 4, 3, 2, 1)
)
