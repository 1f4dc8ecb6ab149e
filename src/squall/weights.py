"""The weights of a program, from where they are stored: what executors lay out, each in its way.

A store knows checkpoints, and what becomes of their number formats; it knows no layout of memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from squall import program as p
from squall.checkpoints.base import Checkpoint, Pages, Tensor, tap_by_tap, transposed
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.quant import FORMATS, Plan

Progress = Callable[[int, int], None]
Floats = NDArray[np.float32]
Weight = p.Matrix | p.Vector


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Rows in one number format, uint8 [rows * row_bytes]; `factors` multiply them, if any do."""

    format: str
    data: NDArray[np.uint8]
    factors: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """What an adapter adds to a matrix [rows, cols] of a decoder: scale * b @ a; and to its bias.

    a: [rank, cols]. b: [rows, rank]. Both are floats; without a, b is [rows, cols].
    Of a table of embeddings, [rows, cols]: a is [rows, rank], b is [cols, rank], and they add
        scale * a @ b.T; without b, a is [rows, cols].
    rank: where one of the two is missing, as wide as the other.
    bias: [rows], added to the product with x.
    """

    a: Stored | None
    b: Stored | None
    rank: int
    scale: float = 1.0
    bias: NDArray[np.float32] | None = None


# (tensor, first row, one past the last) -> format and bytes
Read = Callable[[Tensor, int, int], tuple[str, NDArray[np.uint8]]]


class WeightStore:
    """The weights of one or several checkpoints, and what they are to become.

    plan: what is quantized, and to what. exact: everything becomes float32, for comparisons.
    others: more checkpoints, by the `source` that slices name.
    merged: terms of linears that are added to float matrices and their biases. vectors: what is
        added to other vectors, by role.
    layouts: what executors made of the weights, by kind, which others on this store share.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        plan: Plan | None = None,
        exact: bool = False,
        others: Mapping[str, Checkpoint] = MappingProxyType({}),
        merged: Mapping[p.Site, tuple[Term, ...]] = MappingProxyType({}),
        vectors: Mapping[str, Floats] = MappingProxyType({}),
    ) -> None:
        self.plan = plan or Plan()
        self.exact = exact
        self.checkpoints = {"": checkpoint, **checkpoint.beside, **others}
        self.merged, self.vectors = merged, vectors
        self.layouts: dict[object, object] = {}
        self._changed = {role for role, _ in merged}
        if self.plan.quantizes and checkpoint.quantization:
            raise InvalidRequest(
                f"the weights are quantized already ({checkpoint.quantization}); "
                "quantization on the way in is for float weights"
            )

    def replanned(self, plan: Plan) -> WeightStore:
        """The same weights with another plan."""
        others = {source: found for source, found in self.checkpoints.items() if source}
        return WeightStore(
            self.checkpoints[""], plan=plan, exact=self.exact, others=others, merged=self.merged,
            vectors=self.vectors,
        )  # fmt: skip

    def key(self, weight: Weight) -> object:
        """Equal for weights that become the same, whatever their roles."""
        if isinstance(weight, p.Vector):
            return weight
        role = weight.role if weight.role in self._changed else ""
        return replace(weight, role=role), self.format(weight)

    def becomes(self, weight: Weight) -> int:
        """Bytes of a weight in the format that it becomes."""
        if isinstance(weight, p.Vector):
            return 4 * weight.size
        format = FORMATS[self.format(weight)]
        return weight.experts * weight.rows * -(-weight.cols // format.block) * format.block_bytes

    def format(self, weight: p.Matrix) -> str:
        """The number format that a matrix becomes."""
        stored = "f16" if weight.restored else self._tensor(weight.slices[0]).format
        return self.target(weight, stored)

    def target(self, weight: p.Matrix, stored: str) -> str:
        """The number format that rows of a matrix become; experts may be stored in several."""
        return "f32" if self.exact else self.plan.target(weight.role, stored, weight.whole[1])

    def cuttable(self, weight: p.Matrix) -> tuple[p.Matrix, int]:
        """The matrix as its columns can be parted, and a number of them that stays together."""
        tensors = [self._tensor(part) for part in weight.slices]
        if any(tensor.order is not None for tensor in tensors):
            return replace(weight, restored=True), 1
        stored = {tensor.format for tensor in tensors}
        formats = stored | {self.target(weight, format) for format in stored}
        return weight, math.lcm(*(FORMATS[format].block for format in formats))

    def rows(self, weight: p.Matrix, expert: int) -> Stored:
        """One expert's rows as they are stored, or merged; a dense weight has one expert."""
        rows, cols = weight.whole
        first = expert * rows + (weight.rows_of.start if weight.rows_of else 0)
        read = self._restored if weight.restored else as_ordered
        found = gather(self._tensor, weight.slices, first, first + weight.rows, cols, read)
        terms = self.merged.get((weight.role, expert), ())
        terms = tuple(term for term in terms if term.b is not None and term.b.data.any())
        found = self._merged(weight, found, terms) if terms else found
        return _columns(weight, found) if weight.cols_of else found

    def vector(self, weight: p.Vector) -> NDArray[np.float32]:
        """The values, with the offset."""
        parts = [
            self._tensor(part).to_float32().reshape(-1)[part.start : part.stop]
            for part in weight.slices
        ]
        vector = np.ascontiguousarray(np.concatenate(parts) + np.float32(weight.offset))
        if weight.role in self.vectors:
            vector += self.vectors[weight.role]
        for term in self.merged.get((weight.role.removesuffix(".bias"), 0), ()):
            vector += 0 if term.bias is None else term.bias
        part = weight.part or p.Part(0, weight.size, weight.size)
        if vector.size != part.whole:
            raise InvalidCheckpoint(
                f"{weight.slices[0].tensor} has {vector.size} values, not {part.whole}"
            )
        return vector[part.start : part.stop]

    def each(self, weights: Sequence[Weight], progress: Progress | None) -> Iterator[Weight]:
        """Every distinct weight in turn; the file's pages come before and go after it.

        progress: called with (bytes done, bytes in all).
        """
        distinct = list({self.key(weight): weight for weight in weights}.values())
        done, whole = 0, sum(map(self.nbytes, distinct))
        for weight, following in zip_longest(distinct, distinct[1:]):
            for pages in self._pages(following):
                pages.fetch()
            yield weight
            for pages in self._pages(weight):
                pages.release()
            done += self.nbytes(weight)
            if progress is not None:
                progress(done, whole)

    def arranged(self, program: p.Program) -> p.Program:
        """The program with ops that bring columns into the order that weights are stored in.

        Where an op multiplies its input by several weights that do not agree on an order, these
        are `restored` instead.
        """
        return _Arranger(self._tensor, program).program()

    def _merged(self, weight: p.Matrix, found: Stored, terms: Sequence[Term]) -> Stored:
        """Rows with what terms add, in their format or the plan's; f32 for it to be quantized."""
        if found.format not in MERGEABLE:
            raise InvalidRequest(
                f"the weights of {weight.role} are quantized ({found.format}), and adapters are "
                "merged into floats: keep them beside the model, or merge them into the model "
                "that it was made of"
            )
        target = self.target(weight, found.format)
        format = FORMATS[target if target in MERGEABLE else "f32"]
        cols, begin = weight.whole[1], weight.rows_of.start if weight.rows_of else 0
        size, step = len(found.data) // weight.rows, max(_RUN_VALUES // cols, 1)
        parts = []
        for start in range(0, weight.rows, step):
            stop = min(start + step, weight.rows)
            factors = None if found.factors is None else found.factors[start:stop]
            rows = Stored(found.format, found.data[start * size : stop * size], factors)
            sums = values(rows, cols)
            for term in terms:
                sums += product(term, cols, begin + start, begin + stop)
            if format.name == "f16" and not np.abs(sums).max() <= _MOST_F16:
                raise InvalidRequest(
                    f"with these adapters weights of {weight.role} are too large for f16: keep "
                    "the adapters beside the model"
                )
            parts.append(format.quantize(sums.reshape(-1)))
        return Stored(format.name, np.concatenate(parts), None)

    def _tensor(self, part: p.Slice) -> Tensor:
        tensor = self.checkpoints[part.source].tensors[part.tensor]
        tensor = transposed(tensor) if part.transposed else tensor
        return tensor if part.taps == 1 else tap_by_tap(tensor, part.taps)

    def _restored(self, tensor: Tensor, start: int, stop: int) -> tuple[str, NDArray[np.uint8]]:
        if tensor.order is None:
            return as_ordered(tensor, start, stop)
        name = "f32" if self.exact else "f16"
        values = np.empty((stop - start, tensor.cols), FORMATS[name].layout)
        stored = FORMATS[tensor.format].dequantize(tensor.row_data(start, stop))
        values[:, tensor.order] = stored.reshape(-1, tensor.cols)
        return name, values.reshape(-1).view(np.uint8)

    def nbytes(self, weight: Weight) -> int:
        """Bytes of a weight in the checkpoint."""
        tensor = self._tensor(weight.slices[0])
        units = tensor.rows * tensor.cols
        if isinstance(weight, p.Vector):
            return weight.size * tensor.nbytes // units
        return weight.experts * weight.rows * weight.cols * tensor.nbytes // units

    def _pages(self, weight: Weight | None) -> list[Pages]:
        slices = () if weight is None else weight.slices
        found = (self._tensor(part).pages for part in slices)
        return [pages for pages in found if pages is not None]


# The weights that an op multiplies its input by.
_MULTIPLIED: Mapping[type, tuple[str, ...]] = {
    p.Linear: ("weight",),
    p.GatedLinear: ("gate", "up"),
    p.MixtureOfExperts: ("router", "gate", "up", "down"),
}


MERGEABLE = ("f32", "f16", "bf16")
_RUN_VALUES = 1 << 22
_MOST_F16 = 65504


class _Arranger:
    def __init__(self, tensor: Callable[[p.Slice], Tensor], program: p.Program) -> None:
        self._tensor = tensor
        self._program = program
        self._values = list(program.values)
        self._gathered: dict[tuple[p.Value, bytes], p.Value] = {}
        self._ops: list[p.Op] = []

    def program(self) -> p.Program:
        for op in self._program.ops:
            self._ops.append(self._arranged(op))
        return replace(self._program, ops=tuple(self._ops), values=tuple(self._values))

    def _arranged(self, op: p.Op) -> p.Op:
        names = _MULTIPLIED.get(type(op), ())
        weights = {name: w for name in names if (w := getattr(op, name)) is not None}
        orders = self._orders(*weights.values())
        if orders <= {b""}:
            return op
        if isinstance(op, p.Linear | p.GatedLinear) and len(orders) == 1:
            return replace(op, x=self._input(op.x, *orders))  # not what adapters multiply
        disordered = {name: w for name, w in weights.items() if self._orders(w) != {b""}}
        return replace(op, **{n: replace(w, restored=True) for n, w in disordered.items()})

    def _orders(self, *weights: p.Matrix) -> set[bytes]:
        """The orders of their columns; b"" is the natural one."""
        stored = (weight for weight in weights if not weight.restored)
        tensors = [self._tensor(part) for weight in stored for part in weight.slices]
        orders = (tensor.order for tensor in tensors)
        return {b"" if order is None else order.astype("<u4").tobytes() for order in orders}

    def _input(self, x: p.Value, order: bytes) -> p.Value:
        if (x, order) not in self._gathered:
            out = p.Value(
                len(self._values), f"{x.name}.ordered.{len(self._gathered)}", x.width, x.rows
            )
            self._values.append(out)
            self._ops.append(p.GatherColumns(out, x, order))
            self._gathered[x, order] = out
        return self._gathered[x, order]


def _columns(weight: p.Matrix, rows: Stored) -> Stored:
    """Of rows as the slices have them, the matrix's columns, which are whole blocks."""
    assert weight.cols_of is not None
    size, part = FORMATS[rows.format].row_bytes, weight.cols_of
    data = rows.data.reshape(weight.rows, -1)[:, size(part.start) : size(part.stop)]
    return replace(rows, data=np.ascontiguousarray(data).reshape(-1))


def values(rows: Stored, cols: int) -> NDArray[np.float32]:
    """The values of rows, [rows, cols]."""
    found = FORMATS[rows.format].dequantize(rows.data).reshape(-1, cols)
    return found if rows.factors is None else found * rows.factors[:, None]


def product(term: Term, cols: int, start: int = 0, stop: int | None = None) -> Floats:
    """What a term adds to rows of a linear's matrix."""
    assert term.b is not None
    size = FORMATS[term.b.format].row_bytes(term.rank)
    part = term.b.data[start * size : None if stop is None else stop * size]
    b = values(replace(term.b, data=part), term.rank) * np.float32(term.scale)
    return b if term.a is None else np.matmul(b, values(term.a, cols), dtype=np.float32)


def as_ordered(tensor: Tensor, start: int, stop: int) -> tuple[str, NDArray[np.uint8]]:
    """Rows as the checkpoint has them, their columns in its order."""
    return tensor.format, tensor.row_data(start, stop)


def as_stored(tensor: Tensor, start: int, stop: int) -> tuple[str, NDArray[np.uint8]]:
    """Rows as the checkpoint has them; refuses columns in an order of their own."""
    if tensor.order is not None:
        raise UnsupportedModel(f"tensor {tensor.name} has its columns in an order of its own")
    return as_ordered(tensor, start, stop)


def gather(
    tensor_of: Callable[[p.Slice], Tensor],
    slices: Sequence[p.Slice],
    first: int,
    last: int,
    cols: int,
    read: Read = as_stored,
) -> Stored:
    """Rows `first` to `last` - 1 of the slices, one after another; a copy only if it must be."""
    parts: list[NDArray[np.uint8]] = []
    factors: list[NDArray[np.float32]] = []
    formats: set[str] = set()
    at = 0
    for part in slices:
        start, stop = max(first, at), min(last, at + part.stop - part.start)
        if start < stop:
            tensor, offset = tensor_of(part), part.start - at
            # A row may be several of the tensor's, as a patch of pixels is, or a part of one.
            rows = [(row + offset) * cols / max(tensor.cols, 1) for row in (start, stop)]
            if not all(row.is_integer() and row <= tensor.rows for row in rows):
                raise InvalidCheckpoint(
                    f"tensor {tensor.name} has shape {tensor.shape}, not [{stop + offset}, {cols}]"
                )
            format, data = read(tensor, *map(int, rows))
            parts.append(data)
            formats.add(format)
            factors.append(np.full(stop - start, tensor.factor, np.float32))
        at += part.stop - part.start
    if len(formats) != 1:
        names = ", ".join(part.tensor for part in slices)
        raise UnsupportedModel(f"tensors of one weight differ in format: {names}")
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    scaled = any(factor[0] != 1.0 for factor in factors)
    return Stored(formats.pop(), data, np.concatenate(factors) if scaled else None)
