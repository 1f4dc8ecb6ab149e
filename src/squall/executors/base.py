"""What executors have in common: weights as they lay them out, where adapters may add to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from squall import program as p
from squall.batch import Sequences
from squall.errors import InvalidRequest
from squall.executors import ThreadPool
from squall.quant import FormatTotal
from squall.weights import Progress, Term, Weight, WeightStore

NO_SEQUENCES = Sequences(
    positions=np.empty(0, np.int32),
    bounds=np.empty(0, np.int32),
    block_tables=np.empty((0, 0), np.int32),
)


class _Made(Protocol):
    @property
    def format(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


M = TypeVar("M", bound=_Made)
V = TypeVar("V")
L = TypeVar("L", bound="Laid[Any, Any]")


class Laid(ABC, Generic[M, V]):
    """Weights of a store as matrices and vectors, each made once for all executors on it."""

    def __init__(self, store: WeightStore, *_: object) -> None:
        self._store = store
        self._matrices: dict[object, list[M]] = {}
        self._vectors: dict[p.Vector, V] = {}

    @classmethod
    def of(cls: type[L], store: WeightStore, *how: object) -> L:
        """Those of this store. how: what else they depend on."""
        found = store.layouts.setdefault((cls, *how), cls(store, *how))
        assert isinstance(found, cls)
        return found

    @abstractmethod
    def _matrix(self, weight: p.Matrix, pool: ThreadPool) -> list[M]:
        """All experts of a matrix, in one or more of the same size."""

    @abstractmethod
    def _vector(self, weight: p.Vector) -> V: ...

    def load(self, weights: Sequence[Weight], pool: ThreadPool, progress: Progress | None) -> None:
        """Make those that are not there yet."""
        there = self._matrices.keys() | self._vectors.keys()
        missing = [weight for weight in weights if self._store.key(weight) not in there]
        for weight in self._store.each(missing, progress):
            if isinstance(weight, p.Vector):
                self._vectors[weight] = self._vector(weight)
            else:
                self._matrices[self._store.key(weight)] = self._matrix(weight, pool)

    def matrices(self, weight: p.Matrix) -> list[M]:
        return self._matrices[self._store.key(weight)]

    def matrix(self, weight: p.Matrix) -> M:
        """The only one."""
        (matrix,) = self.matrices(weight)
        return matrix

    def vector(self, weight: p.Vector | None) -> V | None:
        """The values, if there are some."""
        return None if weight is None else self._vectors[weight]

    def totals(self, weights: Sequence[Weight]) -> tuple[FormatTotal, ...]:
        """What the matrices among the weights became."""
        distinct = {self._store.key(w): w for w in weights if isinstance(w, p.Matrix)}
        found = []
        for key, weight in distinct.items():
            made = self._matrices[key]
            size = weight.experts * weight.rows * weight.cols // len(made)
            firsts = {part.format: part for part in made[::-1]}.values()
            found += [FormatTotal(m.format, m in firsts, size, m.nbytes) for m in made]
        return summed(found)


def summed(totals: Iterable[FormatTotal]) -> tuple[FormatTotal, ...]:
    """One of each format."""
    found: dict[str, list[list[int]]] = {}
    for name, *counts in map(astuple, totals):
        found.setdefault(name, []).append(counts)
    return tuple(FormatTotal(name, *map(sum, zip(*of, strict=True))) for name, of in found.items())


# ---- adapters ----


# A number for each weight that adapters may change, the weight, and whether it is a table.
Sites = Mapping[p.Site, tuple[int, p.Matrix, bool]]


def sites_of(program: p.Program) -> Sites:
    """Where adapters may add to a program."""
    found: dict[p.Site, tuple[int, p.Matrix, bool]] = {}
    number = 0
    for op in program.ops:
        if getattr(op, "adapters", None) is None:
            continue
        for matrix in p.matrices(op):
            for expert in range(matrix.experts):
                found[matrix.role, expert] = (number, matrix, isinstance(op, p.Embed))
                number += 1
    return found


def layout_of(sites: Sites) -> int:
    """Adapters fit wherever the weights that they may change are alike."""
    return hash(tuple((number, m.rows, m.cols, table) for number, m, table in sites.values()))


def shapes_of(sites: Sites, site: p.Site, term: Term) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a term's a and b. Raises InvalidRequest for no such site, or for parts that lack."""
    if site not in sites:
        raise InvalidRequest(f"the model has no weight {site[0]} for adapters to change")
    _, matrix, table = sites[site]
    rank, rows, cols = term.rank, matrix.rows, matrix.cols
    needed = term.a if table else term.b
    lacks = needed is None or (None in (term.a, term.b) and rank != cols)
    if lacks or (term.bias is not None and term.bias.shape != (rows,)):
        raise InvalidRequest(
            f"an adapter lacks a part of what it adds to {site[0]}, or one does not fit"
        )
    return ((rows, rank), (cols, rank)) if table else ((rank, cols), (rows, rank))
