"""What an adapter's file holds, put together as terms of a base's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.adapters.target import Places, Target
from squall.checkpoints.base import Tensor
from squall.errors import InvalidCheckpoint
from squall.files import quote
from squall.program import Site
from squall.quant import FORMATS
from squall.recipes.modules import norm_offset, row_order
from squall.weights import Floats, Stored, Term, product, values

MAX_RANK = 4096
TABLE = "embed"
Array = NDArray[Any]
"""Floats as they are stored: bf16 as the integers that its bits are."""
_FORMATS = {FORMATS[name].layout: name for name in ("f32", "f16", "bf16")}


def array_of(tensor: Tensor) -> Array:
    """A tensor's numbers, in memory of our own, since the file may change."""
    if tensor.format not in FORMATS or not all(tensor.shape or [0]):
        raise InvalidCheckpoint(
            f"tensor {quote(tensor.name)} has format {tensor.format} and shape {tensor.shape}; "
            f"those of adapters must be {', '.join(_FORMATS.values())} or blocks, and not empty"
        )
    if tensor.format in _FORMATS.values():
        array: Array = tensor.data.view(FORMATS[tensor.format].layout).reshape(tensor.shape).copy()
    else:
        array = tensor.to_float32()
    if not np.isfinite(_float32(array)).all():
        raise InvalidCheckpoint(f"tensor {quote(tensor.name)} has numbers that are not finite")
    return array


def _stored(array: Array) -> Stored:
    rows = np.ascontiguousarray(array)
    return Stored(_FORMATS[rows.dtype], rows.reshape(-1).view(np.uint8), None)


def _float32(array: Array) -> Floats:
    return values(_stored(array), 1).reshape(array.shape)


@dataclass(slots=True, eq=False)
class Parts:
    """The parts so far. as_gguf: they are as GGUF files have them.

    vectors: changes of norms, by role. homeless: a role whose bias the base has no place for.
    """

    target: Target
    as_gguf: bool
    vectors: dict[str, Floats] = field(default_factory=dict)
    homeless: str = ""
    _terms: dict[Site, Term] = field(default_factory=dict)
    _changes: dict[Site, Floats] = field(default_factory=dict)
    _biases: dict[Site, Floats] = field(default_factory=dict)

    def low_rank(
        self, module: str, a: Array, b: Array, scale: float, bias: Array | None = None
    ) -> None:
        """scale * (b @ a + bias). a: [experts, rank, cols], b: [experts, rows, rank].

        Of a table, a is [1, rows, rank] and b [1, cols, rank].
        """
        readings, rank = self.target.readings(module), b.shape[-1]
        found = (p for p in readings if self._shapes(p, rank) == (a.shape, b.shape))
        places = next(found, ())
        twice = self._terms.keys() & {site for site, _, _ in places}
        if not places and self.target.is_unused(module):
            return
        if not places or not 1 <= rank <= MAX_RANK or twice:
            raise self.misfit(module, a.shape[1:], b.shape[1:])
        linear = len(b) == 1 and places[0][0][0] != TABLE
        if bias is not None and not (linear and bias.shape == self._size(places, "bias")):
            raise self.misfit(module, bias.shape)
        for site, start, stop in places:
            expert, rows = site[1] if len(b) > 1 else 0, self._rows(site[0], start, stop)
            up = b[expert] if site[0] == TABLE else b[expert][rows]
            self._terms[site] = Term(_stored(a[expert]), _stored(up), rank, scale)
            if bias is not None:
                self._bias(site, _float32(bias)[rows] * np.float32(scale))

    def whole(self, name: str, array: Array, *, trained: bool = True) -> None:
        """A weight or bias in place of the base's.

        trained: otherwise it is the base's own, which a quantized base keeps as it has it.
        """
        found, target = _float32(array), self.target
        module, _, kind = name.rpartition(".")
        norm = target.norm(name, found.size)
        if norm is not None:
            role, start = norm
            base = target.vector(role, 0)
            change = self.vectors.setdefault(role, np.zeros_like(base))
            own, offset = slice(start, start + found.size), norm_offset(target.gguf) * self._shift
            change[own] = found.reshape(-1) + np.float32(offset) - base[own]
            return
        wanted = (p for p in target.readings(module) if self._size(p, kind) == found.shape)
        places = next(wanted, ())
        if not places:
            raise self.misfit(module, found.shape)
        for site, start, stop in places:
            rows = found[self._rows(site[0], start, stop)]
            if kind == "weight" and (trained or target.is_float(site[0])):
                self._changes[site] = rows - target.values(site)
            elif kind == "bias":
                self._bias(site, rows - target.vector(f"{site[0]}.bias", rows.size))

    def terms(self) -> dict[Site, Term]:
        """All that is added to matrices and their biases, one term a site."""
        found = dict(self._terms)
        for site, change in self._changes.items():
            if change.any():
                cols = change.shape[1]
                if site in found:
                    change += product(as_linear(site, found[site]), cols)
                found[site] = as_linear(site, Term(None, _stored(change), cols))
        for site, bias in self._biases.items():
            if bias.any():
                size = self._size(((site, 0, len(bias)),), "weight")
                b, a = (_stored(np.zeros(n, np.float32)) for n in size)
                found[site] = replace(found.get(site, Term(a, b, 1)), bias=bias)
        return found

    def digest(self, terms: Mapping[Site, Term]) -> str:
        """Of all that changes results."""
        found = hashlib.sha256()
        for site, term in sorted(terms.items()):
            given = [None if p is None else p.format for p in (term.a, term.b)]
            found.update(repr((site, term.rank, term.scale, given, term.bias is None)).encode())
            for part in (term.a, term.b):
                found.update(b"" if part is None else part.data.tobytes())
            found.update(b"" if term.bias is None else term.bias.tobytes())
        for role, change in sorted(self.vectors.items()):
            found.update(role.encode() + change.tobytes())
        return found.hexdigest()

    def misfit(self, module: str, *shapes: tuple[int, ...]) -> InvalidCheckpoint:
        """What to raise for tensors of these shapes."""
        places = self.target.sites(module)
        there = f"has {self._size(places, 'weight')} there" if places else "has no such module"
        return InvalidCheckpoint(
            f"the adapter has tensors of {quote(module)} of shapes {', '.join(map(str, shapes))}; "
            f"the base model {there}. An adapter is made for its base, has a module once, and a "
            f"rank of 1 to {MAX_RANK}"
        )

    def _shapes(self, places: Places, rank: int) -> tuple[tuple[int, ...], ...]:
        rows, cols = self._size(places, "weight")
        if places[0][0][0] == TABLE:
            return (1, rows, rank), (1, cols, rank)
        experts = len({expert for (_, expert), _, _ in places})
        return (experts, rank, cols), (experts, rows, rank)

    def _size(self, places: Places, kind: str) -> tuple[int, ...]:
        matrix = self.target.matrix(places[0][0][0])
        assert matrix is not None
        return (places[-1][2], matrix.cols) if kind == "weight" else (places[-1][2],)

    def _rows(self, role: str, start: int, stop: int) -> Any:
        """Which rows of a module are a weight's, in the base's order."""
        order = row_order(self.target.gguf, self.target.decoder, role) if self._shift else None
        if order is None:
            return slice(start, stop)
        return start + (order if self._shift > 0 else np.argsort(order))

    @property
    def _shift(self) -> int:
        """1: the base is as GGUF files are, and the adapter is not; -1: the other way round."""
        return (self.target.checkpoint.kind == "gguf") - self.as_gguf

    def _bias(self, site: Site, change: Floats) -> None:
        self._biases[site] = self._biases.get(site, np.float32(0)) + change
        if change.any() and f"{site[0]}.bias" not in self.target.names:
            self.homeless = site[0]


def as_linear(site: Site, term: Term) -> Term:
    """A table's term as that of a linear's matrix, and the other way round; others stay."""
    if site[0] != TABLE:
        return term
    if term.b is None or term.a is None:
        return replace(term, a=term.b, b=term.a)
    return replace(term, a=_stored(values(term.b, term.rank).T), b=term.a)
