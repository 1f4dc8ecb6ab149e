"""GPTQ's layout: codes packed along the inputs, zeros along the outputs, a group an input.

`qweight` int32 [inputs * bits / 32, outputs], `qzeros` int32 [groups, outputs * bits / 32],
`scales` [groups, outputs], `g_idx` int32 [inputs]. Values lie in the words as in one little-endian
bit string, so that with 3 bits two of 32 values span words.

"gptq" stores zeros less one, and "gptq_v2" as they are. A zero of 0 borrows from the next in its
word, as what writes these files subtracts from whole words; 3 bits do not come so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from squall.quant.grouped import Grouped, block_for, unpack_rows

BITS = (2, 3, 4, 8)


def shapes(bits: int, group: int, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the stored tensors of a weight."""
    groups = -(-inputs // group)
    return {
        "qweight": (inputs * bits // 32, outputs),
        "qzeros": (groups, outputs * bits // 32),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }


def size(bits: int, qweight: tuple[int, int]) -> tuple[int, int]:
    """Outputs and inputs by the shape of `qweight`."""
    return qweight[1], qweight[0] * 32 // bits


def grouped(  # noqa: PLR0913
    qweight: NDArray[np.uint32],
    qzeros: NDArray[np.uint32],
    scales: NDArray[np.float16],
    groups: NDArray[np.int32],
    *,
    bits: int,
    group: int,
    less_one: bool = True,
) -> Grouped:
    """A weight as these tensors have it; `less_one`: its zeros are stored so."""

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        return unpack_rows(qweight[:, start:stop].T, bits)

    def zeros(start: int, stop: int) -> NDArray[np.uint8]:
        one_each = np.uint32(0xFFFFFFFF // ((1 << bits) - 1))  # in every value of a word
        found = unpack_rows(qzeros + one_each if less_one and bits != 3 else qzeros, bits)
        if less_one and bits == 3:
            found = (found + np.uint8(1)) & np.uint8(7)
        return found[:, start:stop].T

    return Grouped(bits, block_for(group, len(groups)), codes, zeros, scales, groups)
