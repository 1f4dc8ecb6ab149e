"""What an adapter's file holds, put together as terms of a base's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.adapters.target import TABLE, Target
from squall.checkpoints.base import Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.program import Site
from squall.quant import FORMATS
from squall.weights import Stored, Term, product, values

MAX_RANK = 4096
_EXPONENTS = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}


@dataclass(frozen=True, slots=True, eq=False)
class Floats:
    """A tensor's values as they are stored, in memory of our own: the file may change."""

    name: str
    format: str
    array: NDArray[Any]

    @classmethod
    def of(cls, tensor: Tensor) -> Floats:
        """Raises for what is no finite float."""
        if tensor.format not in _EXPONENTS:
            raise UnsupportedModel(
                f"tensor {quote(tensor.name)} has format {tensor.format}; those of adapters must "
                f"be {', '.join(_EXPONENTS)}"
            )
        array = tensor.data.view(FORMATS[tensor.format].layout).reshape(tensor.shape).copy()
        mask = _EXPONENTS[tensor.format]
        if ((array.view(f"u{array.itemsize}") & mask) == mask).any():
            raise InvalidCheckpoint(
                f"tensor {quote(tensor.name)} holds numbers that are not finite"
            )
        return cls(tensor.name, tensor.format, array)

    def stored(self, *index: Any) -> Stored:
        """A part of the array as a matrix's rows."""
        part = np.ascontiguousarray(self.array[index])
        return Stored(self.format, part.reshape(-1).view(np.uint8), None)

    def float32(self) -> NDArray[np.float32]:
        rows = self.stored()
        return values(rows, self.array.shape[-1]).reshape(self.array.shape)


@dataclass(slots=True, eq=False)
class Parts:
    """The terms and vectors so far. paired: q and k have their rows as in GGUF files."""

    target: Target
    paired: bool = False
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _terms: dict[Site, Term] = field(default_factory=dict)
    _changes: dict[Site, NDArray[np.float32]] = field(default_factory=dict)
    _biases: dict[Site, NDArray[np.float32]] = field(default_factory=dict)

    def low_rank(
        self, module: str, a: Floats, b: Floats, scale: float, bias: Floats | None = None
    ) -> None:
        """scale * (b @ a + bias). a: [experts, rank, cols], b: [experts, rows, rank].

        Of a table, a is [1, rows, rank] and b [1, cols, rank].
        """
        readings = list(self.target.readings(module))
        if not readings:
            raise self.unknown(a.name)
        rank = b.array.shape[-1]
        shapes = [self._shapes(places, rank) for places in readings]
        if not 1 <= rank <= MAX_RANK or (a.array.shape, b.array.shape) not in shapes:
            raise InvalidCheckpoint(
                f"tensors {quote(a.name)} and {quote(b.name)} have shapes {a.array.shape[1:]} and "
                f"{b.array.shape[1:]}; the base asks for {shapes[0][0][1:]} and "
                f"{shapes[0][1][1:]}, of a rank of 1 to {MAX_RANK}"
            )
        places = readings[shapes.index((a.array.shape, b.array.shape))]
        for site, start, stop in places:
            if site in self._terms:
                raise InvalidCheckpoint(f"two tensors are for {site[0]}, one is {quote(a.name)}")
            expert = site[1] if len(b.array) > 1 else 0
            rows = self._rows(site, start, stop)
            self._terms[site] = Term(a.stored(expert), b.stored(expert, rows), rank, scale)
            if bias is not None:
                self._biases[site] = bias.float32()[rows] * np.float32(scale)

    def whole(self, name: str, tensor: Floats) -> None:
        """A weight or bias in place of the base's."""
        found, target = tensor.float32(), self.target
        norm = target.norm(name, found.size)
        if norm is not None:
            role, start = norm
            base = target.values(role)
            whole = self.vectors.setdefault(role, np.zeros_like(base))
            offset = target.norm_offset(paired=self.paired)
            whole[start : start + found.size] = found.reshape(-1) + np.float32(offset)
            whole[start : start + found.size] -= base[start : start + found.size]
            return
        module, _, kind = name.rpartition(".")
        for places in target.readings(module):
            size = places[-1][2], target.size(places[0][0])[1]
            if found.shape == (size if kind == "weight" else size[:1]):
                break
        else:
            raise self.unknown(tensor.name, found.shape)
        for site, start, stop in places:
            rows = found[self._rows(site, start, stop)]
            if kind == "weight":
                self._changes[site] = rows - target.matrix(site)
            else:
                bias = rows - target.values(f"{site[0]}.bias")
                self._biases[site] = self._biases.get(site, 0) + bias

    def terms(self) -> dict[Site, Term]:
        """All that is added to matrices and their biases, one term a site."""
        found = dict(self._terms)
        for site, change in self._changes.items():
            if not change.any():
                continue
            if site in found:
                change = change + product(as_linear(site, found[site]), change.shape[1])
            rows = stored(change)
            a, b = (rows, None) if site[0] == TABLE else (None, rows)
            found[site] = Term(a, b, change.shape[1])
        for site, bias in self._biases.items():
            if not bias.any():
                continue
            size = self.target.size(site)
            none = Term(stored(np.zeros(size[1])), stored(np.zeros(size[0])), 1)
            found[site] = replace(found.get(site, none), bias=bias)
        return found

    def digest(self, terms: Mapping[Site, Term]) -> str:
        """Of all that changes results."""
        found = hashlib.sha256()
        for site, term in sorted(terms.items()):
            rows = [part for part in (term.a, term.b) if part is not None]
            formats = [(part.format, part.data.size) for part in rows]
            bias = None if term.bias is None else term.bias.size
            found.update(
                repr((site, term.rank, term.scale, formats, term.a is None, bias)).encode()
            )
            for data in (*(part.data for part in rows), term.bias):
                found.update(b"" if data is None else data.tobytes())
        for role, change in sorted(self.vectors.items()):
            found.update(repr((role, change.size)).encode() + change.tobytes())
        return found.hexdigest()

    def _shapes(self, places: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, cols = self.target.size(places[0][0])
        if places[0][0][0] == TABLE:
            return (1, rows, rank), (1, cols, rank)
        experts = len({expert for (_, expert), _, _ in places})
        return (experts, rank, cols), (experts, places[-1][2], rank)

    def _rows(self, site: Site, start: int, stop: int) -> Any:
        """Which rows of a module are a site's, in the base's order."""
        order = self.target.order(site[0], paired=self.paired)
        return slice(start, stop) if order is None else start + order

    def unknown(self, name: str, shape: tuple[int, ...] | None = None) -> UnsupportedModel:
        given = "" if shape is None else f" of shape {shape}"
        return UnsupportedModel(
            f"the adapter's tensor {quote(name)}{given} belongs to nothing in the base model; is "
            "the adapter made for it?"
        )


def stored(array: NDArray[np.floating[Any]]) -> Stored:
    """Rows of float32."""
    return Stored("f32", np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8), None)


def as_linear(site: Site, term: Term) -> Term:
    """The same for the matrix of a linear; only a table's term is another."""
    if site[0] != TABLE:
        return term
    if term.b is None:
        return replace(term, a=None, b=term.a)
    cols = values(term.b, term.rank)
    return replace(term, a=stored(cols.T), b=term.a)
