"""Blocks of files taken apart on a device: codes a byte each, scales, and what is subtracted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from squall.quant import Format, hqq

# Of a scale or a minimum: the float of each block, and what it is multiplied by in groups.
Pair = tuple[Tensor, Tensor | None]
Apart = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

_DTYPES = {
    "<f2": torch.float16, "<f4": torch.float32, "<i2": torch.int16,
    "|u1": torch.uint8, "|i1": torch.int8,
}  # fmt: skip
_CODES = {"codes", "high"}
_MIDDLES = {"q4_0": 8, "q5_0": 16, "q3_k": 4, "q6_k": 32}
# Bytes of a run of `codes`, and of `high`, as `squall.quant` has them.
_RUNS = {
    "q4_0": (16, 0), "q4_1": (16, 0), "q5_0": (16, 1), "q5_1": (16, 1), "q2_k": (32, 0),
    "q3_k": (32, 32), "q4_k": (32, 0), "q5_k": (32, 32), "q6_k": (64, 32),
    **{f"hqq{bits}": (run, hqq.RUN[1]) for bits, run in hqq.RUN.items()},
}  # fmt: skip


def bits(format: Format) -> int:
    """Of a code."""
    if format.name.startswith("int"):  # a code a byte, whatever bits it has
        return int(format.name[3])
    sizes = [format.layout[name].itemsize for name in format.layout.names or () if name in _CODES]
    return sum(sizes) * 8 // format.block


def middle(format: Format) -> int:
    """The code that stands for 0."""
    return 128 if _signed(format) else _MIDDLES.get(format.name, 0)


def take_apart(data: Tensor, format: Format) -> Apart:
    """Rows of blocks, uint8 [rows, bytes] -> codes, uint8 [rows, cols]; and as in `Packed` base,
    part, minimum and less.
    """
    fields = _fields(data, format)
    scale, minimum = fields["scale"], fields.get("minimum")
    part: Tensor | None = None
    less: Tensor | None = None
    if format.name in _PARTS:
        part, less = _PARTS[format.name](fields["groups"])
    elif "zero" in fields:  # whole numbers, whose products are exact in float32
        less = fields["zero"].to(torch.uint8)
    elif minimum is not None:
        minimum = -minimum
    return _codes(fields, format), scale, part, minimum, less


def unpack(packed: Tensor, bits: int, run: int) -> Tensor:
    """Codes in runs of so many bytes, as `squall.quant.bits.unpack` has them: [rows, codes]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    codes = packed.reshape(len(packed), -1, 1, run) >> shifts & (1 << bits) - 1
    return codes.reshape(len(packed), -1)


def _signed(format: Format) -> bool:
    return format.layout["codes"].base.kind == "i"


def _fields(data: Tensor, format: Format) -> Mapping[str, Tensor]:
    """Every field, those of a row's blocks one after another."""
    blocks, found = data.view(len(data), -1, format.block_bytes), {}
    for name, (dtype, offset, *_) in (format.layout.fields or {}).items():
        part = blocks[:, :, offset : offset + dtype.itemsize].reshape(len(data), -1)
        found[name] = part.view(_DTYPES[dtype.base.str])
    return found


def _codes(fields: Mapping[str, Tensor], format: Format) -> Tensor:
    codes = fields["codes"]
    if format.name.startswith("int"):
        return codes & (1 << bits(format)) - 1
    if _signed(format):
        return codes.view(torch.uint8) ^ 128
    low_run, high_run = _RUNS[format.name]
    cols = fields["scale"].shape[1] * format.block
    low_bits = codes.shape[1] * 8 // cols
    codes = unpack(codes, low_bits, low_run)
    if (high := fields.get("high")) is not None:
        codes |= unpack(high, high.shape[1] * 8 // cols, high_run) << low_bits
    return codes


def _q3_k(groups: Tensor) -> Pair:
    blocks = groups.view(-1, 12)
    six = unpack(blocks[:, :8], 4, 8) | unpack(blocks[:, 8:], 2, 4) << 4
    return six.view(torch.int8).view(len(groups), -1) - 32, None


def _q4_k(groups: Tensor) -> Pair:
    blocks = groups.view(-1, 12)
    first = blocks[:, :8] & 63
    last = unpack(blocks[:, 8:], 4, 4) | blocks[:, :8] >> 6 << 4
    halves = (torch.cat([first[:, i : i + 4], last[:, i : i + 4]], 1) for i in (0, 4))
    scales, minimums = (half.view(len(groups), -1) for half in halves)
    return scales, minimums


_PARTS: Mapping[str, Callable[[Tensor], Pair]] = {
    "q2_k": lambda groups: (groups & 15, groups >> 4),
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q4_k,
    "q6_k": lambda groups: (groups, None),
}
