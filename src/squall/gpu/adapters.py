"""Adapters on a device: low-rank terms, and what rows with them get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from squall import program as p
from squall.executors.base import Sites, layout_of, shapes_of
from squall.gpu import linear, matrices
from squall.gpu.inputs import expect
from squall.quant import FORMATS
from squall.weights import Stored, Term

if TYPE_CHECKING:
    from squall.gpu.ops import Run


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """scale * b @ a, and a bias, on the device; see `Term`."""

    a: matrices.Plain | None
    b: matrices.Plain | None
    scale: float
    bias: Tensor | None

    def of(self, x: Tensor, *, table: bool, exact: bool) -> Tensor:
        """scale * b @ a @ x; of a table, x are ids."""
        wide = x
        if self.a is not None:
            wide = matrices.lookup(self.a, x) if table else _product(x, self.a, exact)
        return (wide if self.b is None else _product(wide, self.b, exact)) * self.scale


def _product(x: Tensor, weight: matrices.Weight, exact: bool) -> Tensor:
    return linear.linear(x, linear.Product(weight), exact=exact, dtype=torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class TorchAdapter:
    """See `executors.Adapter`. layout: of the sites that it fits."""

    layout: int
    parts: Mapping[p.Site, _Part]

    @property
    def nbytes(self) -> int:
        held = [(part.a, part.b, part.bias) for part in self.parts.values()]
        return sum(one.nbytes for three in held for one in three if one is not None)

    @classmethod
    def of(cls, sites: Sites, terms: Mapping[p.Site, Term], device: torch.device) -> TorchAdapter:
        """Raises InvalidRequest for terms that do not fit."""
        return cls(layout_of(sites), {s: _part(sites, s, t, device) for s, t in terms.items()})


def _part(sites: Sites, site: p.Site, term: Term, device: torch.device) -> _Part:
    shapes = shapes_of(sites, site, term)

    def plain(stored: Stored | None, shape: tuple[int, int]) -> matrices.Plain | None:
        if stored is None:
            return None
        nbytes = shape[0] * FORMATS[stored.format].row_bytes(shape[1])
        expect(len(stored.data) == nbytes, f"an adapter does not fit {site[0]}")
        return matrices.plain(stored, *shape, device)

    a, b = plain(term.a, shapes[0]), plain(term.b, shapes[1])
    bias = None if term.bias is None else torch.as_tensor(term.bias, device=device)
    return _Part(a, b, term.scale, bias)


TorchMixture = Sequence[tuple[TorchAdapter, float]]


@dataclass(frozen=True, slots=True)
class Added:
    """What rows of an op get from their adapters. columns: of scalings, by site."""

    adapters: p.Adapters | None
    columns: Mapping[p.Site, int]
    table: bool
    exact: bool

    @classmethod
    def of(cls, op: p.Embed | p.Linear | p.GatedLinear | p.MixtureOfExperts, exact: bool) -> Added:
        columns = op.adapters.columns if op.adapters else ()
        named = dict(zip(p.sites(op), columns, strict=True)) if columns else {}
        return cls(op.adapters, named, isinstance(op, p.Embed), exact)

    def scalings(self, run: Run) -> Tensor | None:
        """[rows, columns], if there are some."""
        scaled = self.adapters is not None and self.adapters.scalings is not None
        return run[self.adapters.scalings] if scaled else None  # type: ignore[index, union-attr]

    def product(
        self, run: Run, x: Tensor, matrix: p.Matrix, weight: matrices.Weight, bias: Tensor | None
    ) -> Tensor:
        """x @ weight.T + bias, with what adapters add, float32."""
        y = _product(x, weight, self.exact)
        self.add(run, y, (matrix.role, 0))
        return y if bias is None else y + bias

    def add(self, run: Run, y: Tensor, site: p.Site) -> None:
        """To products y, in place, of what adapters multiply; weights may multiply it reordered."""
        if self.adapters is None:
            return
        x, scalings = run[self.adapters.x], self.scalings(run)
        for start, stop, number in run.segments(self.adapters):
            own = slice(start, stop)
            scaling = None if scalings is None else scalings[own]
            self.add_to(y[own], x[own], site, run.mixtures[number], scaling)

    def add_to(
        self, y: Tensor, x: Tensor, site: p.Site, mixture: TorchMixture, scalings: Tensor | None
    ) -> None:
        """To rows that have one mixture."""
        column = self.columns.get(site, -1)
        if scalings is not None and column < 0:
            return
        for i, (adapter, weight) in enumerate(mixture):
            if (part := adapter.parts.get(site)) is not None:
                more = part.of(x, table=self.table, exact=self.exact) * weight
                y += more if scalings is None else more * scalings[:, column + i, None]
                if part.bias is not None:
                    y += part.bias * weight

    def to_experts(
        self, op: p.MixtureOfExperts, mixture: TorchMixture, scalings: Tensor | None
    ) -> linear.Add:
        """What rows that have one mixture get, expert by expert."""
        weights = {"gate": op.gate or op.up, "up": op.up, "down": op.down}

        def add(y: Tensor, x: Tensor, name: str, expert: int, rows: Tensor) -> None:
            scaling = None if scalings is None else scalings[rows]
            self.add_to(y, x, (weights[name].role, expert), mixture, scaling)

        return add
