"""HQQ as UQFF has it: codes, scales and zero points of groups, the codes packed by rows.

The weight is seen as a matrix with a group a column (axis 0: of all rows of the weight, strided) or
a row (axis 1: of consecutive values). A value is (code - zero) * scale. Groups of 64 in a row are
blocks of Squall's own; others have no such form and become floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Tensor
from squall.quant import FORMATS
from squall.quant.hqq import GROUP, RUN

_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True, eq=False)
class Hqq:
    """An HQQ weight of a file; raises ValueError if its parts do not fit together."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    shape: tuple[int, ...]  # of the weight
    bits: int
    group: int
    axis: int

    def __post_init__(self) -> None:
        if self.bits not in _PER_WORD or self.axis not in (0, 1):
            raise ValueError(f"{self.bits} bits on axis {self.axis}")
        size = math.prod(self.shape)
        if self.group < 1 or size % self.group:
            raise ValueError(f"groups of {self.group} of {size} values")
        height, width = self._matrix
        words = -(-height // _PER_WORD[self.bits])
        wanted = ("i32" if self.bits == 3 else "u8", (words, width))
        if (self.codes.format, self.codes.shape) != wanted:
            raise ValueError(f"codes are {self.codes.format} of {self.codes.shape}, not {wanted}")
        counts = {math.prod(tensor.shape) for tensor in (self.scales, self.zeros)}
        if counts != {size // self.group}:
            raise ValueError(f"{counts} scales and zeros of {size // self.group} groups")
        if not np.isfinite([self._extremes()]).all():
            raise ValueError("a scale or a zero point is not finite")

    @property
    def _matrix(self) -> tuple[int, int]:
        groups = math.prod(self.shape) // self.group
        return (self.group, groups) if self.axis == 0 else (groups, self.group)

    @property
    def format(self) -> str:
        """What the weight is to Squall: HQQ blocks, or floats."""
        if self.axis == 1 and self.group == GROUP and self.shape[1] % GROUP == 0:
            exact, rounded = self._scales_minimums(), self._blocks()
            scale, minimum = (rounded[name].astype(np.float32) for name in ("scale", "minimum"))
            close = np.abs(minimum - exact[1]) <= np.abs(exact[1]) * 2**-20 + exact[0] * 2**-12
            if (scale == exact[0]).all() and close.all():
                return f"hqq{self.bits}"
        return "f16" if np.max(np.abs(self._extremes())) <= _LARGEST_HALF else "f32"

    def blocks(self) -> NDArray[np.uint8]:
        """The bytes of the weight in `format`."""
        format = FORMATS[self.format]
        if format.block > 1:
            return self._fill(self._blocks()).view(np.uint8)
        scales, zeros = (self._floats(tensor) for tensor in (self.scales, self.zeros))
        values = (self._unpacked().astype(np.float32) - zeros) * scales
        return format.quantize(values.reshape(-1))

    def _floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """One a group, to be broadcast over the matrix."""
        values = tensor.to_float32().reshape(-1)
        return values[None] if self.axis == 0 else values[:, None]

    def _extremes(self) -> NDArray[np.float32]:
        """The smallest and the largest value that each group could have."""
        scales, zeros = self.scales.to_float32().reshape(-1), self.zeros.to_float32().reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            ends = np.array([[0], [(1 << self.bits) - 1]], np.float32)
            return (ends - zeros) * scales

    def _scales_minimums(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scales, zeros = self.scales.to_float32().reshape(-1), self.zeros.to_float32().reshape(-1)
        return scales, (np.float32(_middle(self.bits)) - zeros) * scales

    def _blocks(self) -> NDArray[np.void]:
        """Blocks without their codes."""
        scales, minimums = self._scales_minimums()
        blocks = np.zeros(len(scales), FORMATS[f"hqq{self.bits}"].layout)
        with np.errstate(over="ignore"):
            blocks["scale"], blocks["minimum"] = scales, minimums
        return blocks

    def _fill(self, blocks: NDArray[np.void]) -> NDArray[np.void]:
        codes = self._unpacked()
        if self.bits == 8:
            blocks["codes"] = codes.astype(np.int16) - 128
        elif self.bits == 3:
            blocks["codes"] = _pack(codes & np.uint8(3), 2, RUN[3])
            blocks["high"] = _pack(codes >> np.uint8(2), 1, RUN[1])
        else:
            blocks["codes"] = _pack(codes, self.bits, RUN[self.bits])
        return blocks

    def _unpacked(self) -> NDArray[np.uint8]:
        """Codes, [height, width] of the matrix. The first rows are in the highest bits."""
        words = self.codes.data.view("<i4" if self.bits == 3 else np.uint8)
        words = words.reshape(self.codes.shape)
        count, mask = _PER_WORD[self.bits], (1 << self.bits) - 1
        rows = [words >> (self.bits * i) & mask for i in reversed(range(count))]
        return np.concatenate(rows).astype(np.uint8)[: self._matrix[0]]


def split(
    blocks: NDArray[np.uint8], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Squall's blocks of HQQ as packed codes (uint8, or int32 [words, 64]), scales and zeros."""
    format = FORMATS[f"hqq{bits}"]
    fields = blocks.view(format.layout)
    plain = fields.copy()
    plain["scale"], plain["minimum"] = 1.0, 0.0
    codes = format.decode(plain).astype(np.int16) + _middle(bits)
    scales = fields["scale"].astype(np.float32)
    zeros = np.float32(_middle(bits)) - fields["minimum"].astype(np.float32) / scales
    count = _PER_WORD[bits]
    step = -(-len(codes) // count)
    padded = np.zeros((step * count, GROUP), np.int32)
    padded[: len(codes)] = codes
    words = np.zeros((step, GROUP), np.int32)
    for i in range(count):
        words |= padded[i * step : (i + 1) * step] << (bits * (count - 1 - i))
    return words.astype("<i4" if bits == 3 else np.uint8), scales, zeros


def fits(rows: int, cols: int, bits: int) -> bool:
    """Whether so many values can be packed; only 3 bits allow a rest."""
    return bits == 3 or rows * cols // GROUP % _PER_WORD[bits] == 0


def _middle(bits: int) -> int:
    return 128 if bits == 8 else 0  # whole bytes are signed in Squall's blocks


def _pack(codes: NDArray[np.uint8], bits: int, run: int) -> NDArray[np.uint8]:
    """The reverse of `quant.bits.unpack`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = codes.reshape(len(codes), -1, len(shifts), run) << shifts
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=2)
    return packed.reshape(len(codes), -1)
