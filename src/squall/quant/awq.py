"""AWQ's layout "gemm": 4 bits; codes and zeros packed along the outputs, in an order of its own.

`qweight` int32 [inputs, outputs / 8], `qzeros` int32 [groups, outputs / 8], `scales` [groups,
outputs]. Of eight outputs a word holds, from the lowest nibble on, 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from squall.quant.grouped import Grouped, block_for, unpack_rows

BITS = (4,)
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)


def shapes(bits: int, group: int, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the stored tensors of a weight."""
    groups, words = -(-inputs // group), outputs * bits // 32
    return {"qweight": (inputs, words), "qzeros": (groups, words), "scales": (groups, outputs)}


def size(bits: int, qweight: tuple[int, int]) -> tuple[int, int]:
    """Outputs and inputs by the shape of `qweight`."""
    return qweight[1] * 32 // bits, qweight[0]


def grouped(
    qweight: NDArray[np.uint32],
    qzeros: NDArray[np.uint32],
    scales: NDArray[np.float16],
    groups: NDArray[np.int32],
    *,
    group: int,
) -> Grouped:

    def unpack(words: NDArray[np.uint32], start: int, stop: int) -> NDArray[np.uint8]:
        first = start // 8
        some = unpack_rows(words[:, first : -(-stop // 8)], 4)
        outputs = some.reshape(len(some), -1, 8)[:, :, _NIBBLE_OF].reshape(len(some), -1)
        return outputs[:, start - 8 * first : stop - 8 * first].T

    codes, zeros = partial(unpack, qweight), partial(unpack, qzeros)
    return Grouped(4, block_for(group, len(groups)), codes, zeros, scales, groups)
