"""Weights of integers in groups of inputs, packed into 32-bit words by GPTQ's or AWQ's rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.quant import integers
from squall.quant.formats import FORMATS

Codes = Callable[[int, int], NDArray[np.uint8]]
# Rows taken apart at a time, so that they stay in the cache.
_ROWS = 128


def block_for(group: int, inputs: int) -> int:
    """The largest block that groups of `group` inputs consist of."""
    for block in reversed(integers.BLOCKS):
        if group % block == 0 and inputs % block == 0:
            return block
    raise UnsupportedModel(
        f"groups of {group} of {inputs} inputs are not supported; both must be multiples of 32"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """A weight [outputs, inputs]: scale * (code - zero), both of an input's group and an output.

    codes: outputs start:stop -> their codes [stop - start, inputs]; zeros: the same, of the groups.
    """

    bits: int
    block: int
    codes: Codes
    zeros: Codes
    scales: NDArray[np.float16]  # [groups, outputs]
    groups: NDArray[np.int32]  # [inputs]

    @property
    def order(self) -> NDArray[np.uint32] | None:
        """The inputs group by group; None: they are so already."""
        order = np.argsort(self.groups, kind="stable").astype(np.uint32)
        return None if np.array_equal(order, np.arange(len(order))) else order

    def blocks(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows start:stop in `order` as blocks of `integers`, the bytes."""
        order, groups = self.order, np.sort(self.groups).reshape(-1, self.block)
        if (groups != groups[:, :1]).any():
            raise InvalidCheckpoint(f"g_idx has groups that are not multiples of {self.block}")
        of_block, layout = groups[:, 0], FORMATS[integers.name(self.bits, self.block)].layout
        found = np.empty((stop - start, len(groups)), layout)
        found["scale"] = self._scales(start, stop)[:, of_block]
        found["zero"] = self.zeros(start, stop)[:, of_block]
        for first in range(start, stop, _ROWS):
            codes = self.codes(first, min(first + _ROWS, stop))
            ordered = codes if order is None else codes[:, order]
            rows = slice(first - start, first - start + len(codes))
            found["codes"][rows] = ordered.reshape(len(codes), -1, self.block)
        return found.reshape(-1).view(np.uint8)

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start:stop as float32 [stop - start, inputs], the inputs where they belong."""
        scales = self._scales(start, stop).astype(np.float32)[:, self.groups]
        zeros = self.zeros(start, stop).astype(np.float32)[:, self.groups]
        values: NDArray[np.float32] = scales * (self.codes(start, stop) - zeros)
        return values

    def _scales(self, start: int, stop: int) -> NDArray[np.float16]:
        scales = self.scales[:, start:stop].T
        if not np.isfinite(scales).all():
            raise InvalidCheckpoint("scales are infinite or NaN in float16")
        return scales


def unpack_rows(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Codes of 2, 3, 4 or 8 bits as a little-endian bit string a row: -> [rows, codes]."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    if bits == 3:  # three bytes are eight codes
        first, second, third = (data[:, i::3].astype(np.uint32) for i in range(3))
        eight = first | second << np.uint32(8) | third << np.uint32(16)
        return _shifted(eight, 3, 8)
    return _shifted(data, bits, 8 // bits)


def _shifted(values: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    codes = np.empty((*values.shape, count), np.uint8)
    for i in range(count):
        codes[..., i] = values >> (bits * i) & ((1 << bits) - 1)
    return codes.reshape(len(values), -1)
