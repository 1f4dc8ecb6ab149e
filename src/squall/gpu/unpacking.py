"""Blocks of files taken apart on a device: codes a byte each, scales, and what is subtracted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from squall.quant import Format, hqq

Parts = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""The integers of a block's groups, uint8 or int8 [blocks, bytes] -> scales, minimums."""

_DTYPES = {
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<i2": torch.int16,
    "|u1": torch.uint8,
    "|i1": torch.int8,
}


@dataclass(frozen=True, slots=True)
class Pieces:
    """Rows of blocks: scale * (code - middle) - minimum.

    codes: uint8 [rows, cols], each of so many bits. scale, minimum: [rows, blocks]. parts: what
        they are multiplied by, [rows, groups]. Parts of a minimum alone multiply the scale.
    """

    codes: Tensor
    bits: int
    middle: int
    scale: Tensor
    parts: Tensor | None
    minimum: Tensor | None
    minimum_parts: Tensor | None


def unpack(packed: Tensor, bits: int, run: int) -> Tensor:
    """Codes in runs of so many bytes, as `squall.quant.bits.unpack` has them: [rows, codes]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    codes = packed.reshape(len(packed), -1, 1, run) >> shifts & (1 << bits) - 1
    return codes.reshape(len(packed), -1)


def take_apart(data: Tensor, format: Format) -> Pieces:
    """Rows of whole blocks, uint8 [rows, bytes]."""
    rows = len(data)
    fields = _fields(data, format)
    codes, bits = _codes(fields, format)
    parts: Tensor | None = None
    minimum, minimum_parts = fields.get("minimum"), None
    if format.name in _PARTS:
        parts, minimum_parts = _PARTS[format.name](fields["groups"])
    elif minimum is not None:
        minimum = -minimum
    elif "zero" in fields:  # whole numbers, whose products are exact in float32
        minimum_parts = fields["zero"].to(torch.uint8)
    middle = _MIDDLES.get(format.name, 0)
    if fields["codes"].dtype == torch.int8:
        middle = 128

    def row(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.view(rows, -1)

    scale = fields["scale"].view(rows, -1)
    return Pieces(
        codes.view(rows, -1), bits, middle, scale, *map(row, (parts, minimum, minimum_parts))
    )


def _fields(data: Tensor, format: Format) -> Mapping[str, Tensor]:
    """Every field of the blocks, [blocks, items]."""
    blocks, layout = data.reshape(-1, format.block_bytes), format.layout
    found = {}
    for name, (dtype, offset, *_) in (layout.fields or {}).items():
        part = blocks[:, offset : offset + dtype.itemsize].contiguous()
        found[name] = part.view(_DTYPES[dtype.base.str])
    return found


def _codes(fields: Mapping[str, Tensor], format: Format) -> tuple[Tensor, int]:
    codes = fields["codes"]
    if format.name.startswith("int"):  # a code a byte, whatever bits it has
        bits = int(format.name[3])
        return codes & (1 << bits) - 1, bits
    low_run, high_run = _RUNS.get(format.name, (0, 0))
    bits = codes.shape[1] * 8 // format.block
    if codes.dtype == torch.int8:
        codes = codes.view(torch.uint8) ^ 128
    codes = unpack(codes, bits, low_run)
    if (high := fields.get("high")) is None:
        return codes, bits
    more = high.shape[1] * 8 // format.block
    return codes | unpack(high, more, high_run) << bits, bits + more


def _q3_k(groups: Tensor) -> tuple[Tensor, None]:
    six = unpack(groups[:, :8], 4, 8) | unpack(groups[:, 8:], 2, 4) << 4
    return six.to(torch.int8) - 32, None


def _q4_k(groups: Tensor) -> tuple[Tensor, Tensor]:
    first = groups[:, :8] & 63
    last = unpack(groups[:, 8:], 4, 4) | groups[:, :8] >> 6 << 4
    scales, minimums = (
        torch.cat([first[:, half], last[:, half]], 1) for half in (slice(0, 4), slice(4, 8))
    )
    return scales, minimums


_PARTS: Mapping[str, Parts] = {
    "q2_k": lambda groups: (groups & 15, groups >> 4),
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q4_k,
    "q6_k": lambda groups: (groups, None),
}
_MIDDLES = {"q4_0": 8, "q5_0": 16, "q3_k": 4, "q6_k": 32}
# Bytes of a run of `codes`, and of `high`, as `squall.quant` has them.
_RUNS = {
    "q4_0": (16, 0), "q4_1": (16, 0), "q5_0": (16, 1), "q5_1": (16, 1), "q2_k": (32, 0),
    "q3_k": (32, 32), "q4_k": (32, 0), "q5_k": (32, 32), "q6_k": (64, 32),
    **{f"hqq{bits}": (run, hqq.RUN[1]) for bits, run in hqq.RUN.items()},
}  # fmt: skip
