"""Unsigned integers with a float scale and an integer zero a block: what GPTQ and AWQ come to.

A value is scale * (code - zero). Files keep them in other ways (`grouped`), which end here: a code
a byte, whatever bits it has; the name tells them, and the block, as in "int4_g128".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.quant.format import Format

BITS = (8, 4, 3, 2)
BLOCKS = (32, 64, 128)


def name(bits: int, block: int) -> str:
    return f"int{bits}_g{block}"


def _layout(block: int) -> np.dtype[Any]:
    return np.dtype([("scale", "<f2"), ("zero", "<f2"), ("codes", "u1", block)])


def _decode(bits: int, blocks: NDArray[Any]) -> NDArray[np.float32]:
    scale, zero = (blocks[field].astype(np.float32)[:, None] for field in ("scale", "zero"))
    codes = (blocks["codes"] & ((1 << bits) - 1)).astype(np.float32)
    values: NDArray[np.float32] = scale * (codes - zero)
    return values


FORMATS = tuple(
    Format(name(bits, block), None, block, _layout(block), partial(_decode, bits))
    for bits in BITS
    for block in BLOCKS
)
"""In the order of the native core."""
