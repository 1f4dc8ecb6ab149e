"""Weights of a store on one device: floats as they are, integers packed in one layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

RUN = 32  # bytes of a plane of codes that belong together


class _Weight:
    """`experts` matrices [rows, cols]."""

    rows: int
    cols: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self))

    @property
    def device(self) -> torch.device:
        return next(_tensors(self)).device


@dataclass(frozen=True, slots=True, eq=False)
class Plain(_Weight):
    """Floats. values: [experts, rows, cols]."""

    format: str
    experts: int
    rows: int
    cols: int
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Float8(_Weight):
    """f8_e4m3. values: [experts, rows, cols], times factors [experts, rows]."""

    format: str
    experts: int
    rows: int
    cols: int
    values: Tensor
    factors: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """Of groups along a row: base[.., k // base_group] * part[.., k // group].

    base: f16 or f32, [experts, rows, groups]. part: uint8 or int8; None: 1, and group says nothing.
    """

    base: Tensor
    part: Tensor | None
    base_group: int
    group: int


@dataclass(frozen=True, slots=True, eq=False)
class Packed(_Weight):
    """Integers: scale * (code - middle) - minimum, in float32 and in this order.

    low, high: planes of codes, code = low | high << low_bits, uint8 [experts, rows, bytes]. Of b
        bits, 32 bytes hold 256 / b values, byte i those at i + 32 * j in its bits j * b.
    padded: columns that planes and scales have, whole runs of both planes; scales end with zeros.
    """

    format: str
    experts: int
    rows: int
    cols: int
    padded: int
    low: Tensor
    low_bits: int
    high: Tensor | None
    high_bits: int
    scale: Scales
    minimum: Scales | None
    middle: int


Weight = Plain | Float8 | Packed


def _tensors(item: object) -> Iterator[Tensor]:
    for field in fields(item):  # type: ignore[arg-type]  # of dataclasses only
        found = getattr(item, field.name)
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, Scales):
            yield from _tensors(found)
