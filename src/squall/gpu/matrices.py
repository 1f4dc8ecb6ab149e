"""Weights of a store on one device: floats as they are, integers packed in one layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from squall import _native
from squall import program as p
from squall.errors import InvalidCheckpoint
from squall.executors.base import Laid
from squall.gpu import uses_triton
from squall.gpu.unpacking import bits, middle, take_apart, unpack
from squall.machine import available_bytes
from squall.quant import FORMATS, Format
from squall.weights import Stored, WeightStore, values

RUN = 32  # bytes of a plane of codes that belong together
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}
# Of wide codes the low bits are one plane, and the rest another.
_LOW_BITS = {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}
# Values taken apart at a time; on a CPU so few that they stay in its cache.
_RUN_VALUES, _CPU_VALUES = 1 << 24, 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """`experts` matrices [rows, cols]."""

    format: str
    experts: int
    rows: int
    cols: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors(self))

    @property
    def device(self) -> torch.device:
        return _tensors(self)[0].device


@dataclass(frozen=True, slots=True, eq=False)
class Plain(_Weight):
    """Floats. values: [experts, rows, cols]."""

    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Float8(_Weight):
    """f8_e4m3. values: [experts, rows, cols], times factors [experts, rows]."""

    values: Tensor
    factors: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Packed(_Weight):
    """Integers: scale * (code - middle) - minimum, in float32 and in this order.

    low, high: planes of codes, code = low | high << low_bits, uint8 [experts, rows, bytes]. Of b
        bits, 32 bytes hold 256 / b values, byte i those at i + 32 * j in its bits j * b.
    padded: columns that planes and scales have, whole runs of both planes; those added are worth 0.
    base, part: scale = base[.., k // base_group] * part[.., k // group]; f16 or f32, and uint8 or
        int8 [experts, rows, groups]; without parts it is the base.
    minimum, less: of the minimum, by the same groups; None: there is none; only less: times base.
    """

    padded: int
    low: Tensor
    low_bits: int
    high: Tensor | None
    high_bits: int
    middle: int
    base_group: int
    group: int
    base: Tensor
    part: Tensor | None
    minimum: Tensor | None
    less: Tensor | None

    @property
    def least(self) -> Tensor | None:
        """What the parts of the minimum multiply."""
        return self.minimum if self.less is None or self.minimum is not None else self.base


Weight = Plain | Float8 | Packed
_Whole = TypeVar("_Whole", bound=Plain | Float8 | Packed)


class Matrices(Laid[Weight, Tensor]):
    """On one device, all experts as one.

    dtype: of activations there, and of all that is no integer but vectors. floats: whatever is
        packed or of 8 bits becomes float32, so that it is taken apart once.
    """

    def __init__(
        self, store: WeightStore, device: torch.device, dtype: torch.dtype, floats: bool = False
    ) -> None:
        super().__init__(store)
        self._device, self._dtype, self._floats = device, dtype, floats

    def _vector(self, weight: p.Vector) -> Tensor:
        return torch.from_numpy(self._store.vector(weight)).to(self._device)

    def _matrix(self, weight: p.Matrix, pool: _native.ThreadPool) -> list[Weight]:
        stored = [self._store.rows(weight, expert) for expert in range(weight.experts)]
        targets = {self._store.target(weight, rows.format) for rows in stored}
        target = targets.pop() if len(targets) == 1 else "f32"
        run = _run(weight.cols, self._device)
        if target.startswith("hqq"):  # which is fitted to the whole matrix
            run = weight.rows
        whole: Weight | None = None
        for expert, rows in enumerate(stored):
            for start, part in _runs(rows, weight.rows, run):
                quantized = _quantized(part, weight, target, pool)
                made = self._piece(quantized, weight.cols, target)
                whole = whole or _room(made, weight)
                for to, piece in zip(_tensors(whole), _tensors(made), strict=True):
                    to[expert, start : start + made.rows] = piece[0]
        assert whole is not None
        return [_unpacked(whole) if self._floats else whole]

    def _piece(self, rows: Stored, cols: int, target: str) -> Weight:
        """Rows on the device, as one expert."""
        data, factors = _sent(rows, cols, self._device)
        if target == "f8_e4m3" and self._device.type != "mps":
            if factors is None:
                factors = torch.ones(len(data), dtype=torch.float32, device=self._device)
            found = data.view(torch.float8_e4m3fn)
            return Float8(target, 1, len(data), cols, found[None], factors[None])
        if target == rows.format and FORMATS[target].block > 1 and factors is None:
            return _packed(data, cols, FORMATS[target])
        return _plain(_values(data, factors, cols, rows.format).to(self._dtype))


def plain(stored: Stored, rows: int, cols: int, device: torch.device) -> Plain:
    """Floats as they are stored, such as an adapter's."""
    data, factors = _sent(stored, cols, device)
    return _plain(_values(data, factors, cols, stored.format).reshape(rows, cols))


def floats_fit(weights: Sequence[p.Matrix | p.Vector], device: torch.device) -> bool:
    """Whether they may become float32: no kernel of the device takes others, and memory is free."""
    if device.type != "cpu" or uses_triton(torch.empty(0)):
        return False
    sizes = (4 * w.experts * w.rows * w.cols for w in weights if isinstance(w, p.Matrix))
    return sum(sizes) <= (available_bytes() or 0) // 2


def _unpacked(m: Weight) -> Plain:
    if isinstance(m, Plain):
        return m
    values = torch.stack([dense(m, expert) for expert in range(m.experts)])
    return Plain(m.format, m.experts, m.rows, m.cols, values)


def dense(m: Weight, expert: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of one expert, [rows, cols]."""
    parts = [rows.to(dtype) for rows in dense_runs(m, expert)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dense_runs(m: Weight, expert: int = 0) -> Iterator[Tensor]:
    """The same in float32, so many rows at a time as need little memory."""
    run = _run(m.cols, m.device)
    for start in range(0, m.rows, run):
        part = slice(start, start + run)
        yield _dense(_mapped(m, lambda t, part=part: t[expert, part]))  # type: ignore[misc]


def lookup(table: Weight, ids: Tensor) -> Tensor:
    """Rows of the one expert, float32 [ids, cols]."""
    return _dense(_mapped(table, lambda t: t[0, ids]))


def one(m: Weight, expert: int) -> Weight:
    """One expert's matrix as a dense weight, in the same memory."""
    return replace(_mapped(m, lambda tensor: tensor[expert : expert + 1]), experts=1)


def _dense(m: Weight) -> Tensor:
    """The values of one expert that has lost its axis."""
    if isinstance(m, Plain):
        return m.values.float()
    if isinstance(m, Float8):
        return m.values.float() * m.factors[:, None]
    codes = unpack(m.low, m.low_bits, RUN)
    if m.high is not None:
        codes = codes | unpack(m.high, m.high_bits, RUN) << m.low_bits
    found = (codes.float() - m.middle).view(len(codes), -1, m.group) * _groups(m, m.base, m.part)
    if m.least is not None:
        found -= _groups(m, m.least, m.less)
    return found.reshape(len(codes), -1)[:, : m.cols]


def _groups(m: Packed, base: Tensor, part: Tensor | None) -> Tensor:
    """Of each group, [rows, groups, 1]."""
    found = base.float().repeat_interleave(m.base_group // m.group, 1)
    return (found if part is None else found * part.float())[:, :, None]


# ---- from the store to the device ----


def _run(cols: int, device: torch.device) -> int:
    """How many rows at a time."""
    return max((_CPU_VALUES if device.type == "cpu" else _RUN_VALUES) // cols, 1)


def _runs(stored: Stored, rows: int, run: int) -> Iterator[tuple[int, Stored]]:
    """Each first row, and so many rows."""
    data, factors = stored.data.reshape(rows, -1), stored.factors
    for start in range(0, rows, run):
        part = slice(start, start + run)
        some = None if factors is None else factors[part]
        yield start, Stored(stored.format, data[part].reshape(-1), some)


def _quantized(rows: Stored, weight: p.Matrix, target: str, pool: _native.ThreadPool) -> Stored:
    if target in (rows.format, *FLOATS):
        return rows
    try:
        blocks, factors = _native.quantize(target, values(rows, weight.cols), None, pool)
    except ValueError as error:
        name = weight.slices[0].tensor
        raise InvalidCheckpoint(f"cannot convert tensor {name}: {error}") from None
    return Stored(target, blocks, factors if factors.size else None)


def _sent(stored: Stored, cols: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Bytes [rows, bytes], and factors."""
    # A copy, since the file's pages may go.
    cuda = device.type == "cuda"
    data = torch.empty(stored.data.size, dtype=torch.uint8, device="cpu", pin_memory=cuda)
    data.numpy()[:] = stored.data
    factors = stored.factors
    row_bytes = FORMATS[stored.format].row_bytes(cols)
    return (
        data.to(device, non_blocking=True).view(-1, row_bytes),
        None if factors is None else torch.from_numpy(factors.copy()).to(device),
    )


def _values(data: Tensor, factors: Tensor | None, cols: int, format: str) -> Tensor:
    """[rows, cols]; float32, unless they are other floats and have no factors."""
    if format in FLOATS:
        found = data.view(FLOATS[format])
    elif format == "f8_e4m3":
        # On the host, since not all devices know the type.
        found = data.cpu().view(torch.float8_e4m3fn).float().to(data.device)
    else:
        found = dense(_packed(data, cols, FORMATS[format]))
    return found if factors is None else found.float() * factors[:, None]


def _plain(values: Tensor) -> Plain:
    rows, cols = values.shape
    return Plain(FLOAT_NAMES[values.dtype], 1, rows, cols, values[None])


def _packed(data: Tensor, cols: int, format: Format) -> Packed:
    """One expert of rows of blocks."""
    low_bits = _LOW_BITS[bits(format)]
    high_bits = bits(format) - low_bits
    run = RUN * 8 // min(low_bits, high_bits or 8)
    padded = -(-cols // run) * run
    more = (padded - cols) // format.block * format.block_bytes
    codes, *parts = take_apart(pad(data, (0, more)), format)
    base, part, minimum, less = (None if found is None else found[None] for found in parts)
    assert base is not None
    return Packed(
        format.name, 1, len(data), cols, padded, _plane(codes, low_bits), low_bits,
        _plane(codes >> low_bits, high_bits) if high_bits else None, high_bits, middle(format),
        format.block, format.block if part is None else padded // part.shape[2],
        base, part, minimum, less,
    )  # fmt: skip


def _plane(codes: Tensor, bits: int) -> Tensor:
    """The lowest bits of codes, as one expert."""
    parts = codes.view(len(codes), -1, 8 // bits, RUN)
    plane = torch.zeros_like(parts[:, :, 0])
    for j in range(8 // bits):
        plane |= (parts[:, :, j] & (1 << bits) - 1) << j * bits
    return plane.view(1, len(codes), -1)


# ---- tensors of weights ----


def _tensors(item: _Weight) -> list[Tensor]:
    found = (getattr(item, field.name) for field in fields(item))
    return [one for one in found if isinstance(one, Tensor)]


def _room(piece: Weight, weight: p.Matrix) -> Weight:
    """For all rows and experts of a weight, of which the piece is a part."""

    def room(tensor: Tensor) -> Tensor:
        return tensor.new_empty(weight.experts, weight.rows, *tensor.shape[2:])

    return replace(_mapped(piece, room), experts=weight.experts, rows=weight.rows)


def _mapped(item: _Whole, change: Callable[[Tensor], Tensor]) -> _Whole:
    """The same of changed tensors."""
    found = {field.name: getattr(item, field.name) for field in fields(item)}
    changes: dict[str, Any] = {n: change(x) for n, x in found.items() if isinstance(x, Tensor)}
    return replace(item, **changes)
