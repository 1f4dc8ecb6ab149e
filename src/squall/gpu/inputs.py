"""What a run is given: checked on the host, so that no device sees a bad index; and staged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squall import program as p
from squall.batch import Int32, Sequences
from squall.errors import InvalidRequest, UnsupportedModel
from squall.executors import Floats, Limits

Places = tuple[tuple[str, bool, tuple[int, ...], int], ...]
"""What lies in a buffer: name, whether floats, shape, first element."""
Segment = tuple[int, int, int]
"""Rows start to stop - 1, and their mixture."""


def expect(ok: object, what: str) -> None:
    """Raises InvalidRequest."""
    if not ok:
        raise InvalidRequest(what)


@dataclass(frozen=True, slots=True)
class Given:
    """The indices and inputs of a run, by name, and how many rows each space has.

    segments: by index of mixtures, the rows that have some. groups: by index of rows that share,
        those that several share.
    """

    rows: Mapping[str, int]
    indices: dict[str, Int32]
    values: dict[str, Floats]
    segments: Mapping[str, list[Segment]] = field(default_factory=dict)
    groups: Mapping[str, list[Int32]] = field(default_factory=dict)


@dataclass(slots=True)
class _Use:
    """What an index is for. limit: of its values; into: the space whose rows it names."""

    limit: int | None = None
    into: str | None = None
    fill: Literal["zeros", "none", "own"] = "zeros"  # rows that pad; negative ones name nothing
    mixtures: bool = False


@dataclass(frozen=True, slots=True)
class _Sight:
    """Spans, and what they see; space: whose rows, if keys of the run."""

    spans: p.Index
    of: Literal["cache", "run", "memory"]
    space: str


class Inputs:
    """What a program asks of a run."""

    def __init__(self, program: p.Program, limits: Limits) -> None:
        tokens = limits.rows.get("tokens", 0)
        self._limits, self._context = limits, program.context
        self._most = {space: limits.rows.get(space, tokens) for space in program.spaces}
        self._program = program
        self._uses = {index: _Use() for index in program.indices}
        sights: dict[_Sight, None] = {}
        for op in program.ops:
            self._use(op)
            if isinstance(op, p.Attend):
                of: Literal["cache", "run"] = "run" if op.cache is None else "cache"
                sights[_Sight(op.spans, of, op.k.rows)] = None
            elif isinstance(op, p.Recall):
                sights[_Sight(op.seen, "memory", "")] = None
        self._sights = tuple(sights)
        self.cached = any(sight.of != "run" for sight in sights)

    def _use(self, op: p.Op) -> None:
        uses = self._uses
        match op:
            case p.Embed():
                uses[op.index].limit = min(uses[op.index].limit or op.table.rows, op.table.rows)
            case p.GatherRows():
                self._choose(uses[op.index], op.x.rows, "zeros")
            case p.Overlay():
                self._choose(uses[op.index], op.rows.rows, "none")
            case p.MixtureOfExperts() if op.shared is not None:
                uses[op.shared].fill = "own"
        if (adapters := getattr(op, "adapters", None)) is not None:
            uses[adapters.mixture].mixtures, uses[adapters.mixture].fill = True, "none"

    def _choose(self, use: _Use, space: str, fill: Literal["zeros", "none"]) -> None:
        if use.into is not None and (use.into, use.fill) != (space, fill):
            raise UnsupportedModel(
                "an index chooses rows of two spaces, or is to choose none and some"
            )
        use.into, use.fill = space, fill

    def checked(self, given: Given, sequences: Sequences, mixtures: int) -> Given:
        """In the shapes that ops read. Raises InvalidRequest for what is amiss."""
        rows = given.rows
        for space, count in rows.items():
            expect(count <= self._most[space], "too many rows in a step")
        indices = {}
        uses = self._uses.items()
        for index, use in uses:
            found = _narrowed(given.indices[index.name], index.name)
            shape = (index.axes, rows[index.rows]) if index.axes > 1 else (rows[index.rows],)
            expect(found.size == np.prod(shape), "an index differs from its rows")
            indices[index.name] = found.reshape(shape)
            self._check_index(indices[index.name], use, rows, mixtures)
        for value in self._program.inputs:
            floats = given.values[value.name]
            expect(floats.dtype == np.float32, f"the input {value.name} is not of float32")
            fits = floats.shape == (rows[value.rows], value.width)
            expect(fits, f"the input {value.name} is not [rows, {value.width}]")
        if self.cached:
            self._check_sequences(sequences, rows)
        for sight in self._sights:
            there = _there(sight, rows, sequences)
            first, last = indices[sight.spans.name]
            ok = (first >= 0) & (first <= last) & (last <= there)
            expect(ok.all(), "a row sees a position that is not there")
        return replace(
            given,
            indices=indices,
            segments={i.name: _segments(indices[i.name]) for i, u in uses if u.mixtures},
            groups={i.name: _groups(indices[i.name]) for i, u in uses if u.fill == "own"},
        )

    def _check_index(self, found: Int32, use: _Use, rows: Mapping[str, int], mixtures: int) -> None:
        if not found.size:
            return
        low, high = int(found.min()), int(found.max())
        if use.mixtures:
            expect(high < mixtures, "a row names adapters that are not there")
        elif use.fill == "own":
            backwards = low >= 0 and (found <= np.arange(len(found))).all()
            expect(
                backwards and (found[found] == found).all(),
                "rows that share must name the first of them",
            )
        elif use.into is not None:
            ok = (low >= 0 or use.fill == "none") and high < rows[use.into]
            expect(ok, "a chosen row is outside the step")
        if use.limit is not None:
            expect(low >= 0 and high < use.limit, "a token id is outside the vocabulary")
        elif use.fill == "zeros":
            expect(low >= 0, "an index is negative")

    def _check_sequences(self, at: Sequences, rows: Mapping[str, int]) -> None:
        spaces = {sight.spans.rows for sight in self._sights if sight.of != "run"}
        count, bounds, tables = len(at.positions), at.bounds, at.block_tables
        expect(
            count > 0 and all(rows[space] == count for space in spaces),
            "cached attention needs rows, and a position for each",
        )
        expect(
            len(bounds) >= 2 and bounds[0] == 0 and bounds[-1] == count
            and (np.diff(bounds) >= 0).all(),
            "sequence bounds must ascend from 0 to the number of rows",
        )  # fmt: skip
        expect(tables.ndim == 2 and len(tables) == len(bounds) - 1, "one block table a sequence")
        positions = at.positions
        inside = positions.min() >= 0 and positions.max() < self._context
        expect(inside, "a position is outside the context")
        follows = np.diff(positions) == 1
        follows[bounds[1:-1][(bounds[1:-1] > 0) & (bounds[1:-1] < count)] - 1] = True
        expect(follows.all(), "positions of a sequence must ascend by one")
        filled = np.diff(bounds) > 0
        needed = positions[bounds[1:][filled] - 1] // self._limits.block_size + 1
        width = tables.shape[1]
        expect(needed.max() <= width, "a block table is shorter than its sequence")
        used = tables[filled][np.arange(width) < needed[:, None]]
        inside = used.min() >= 0 and used.max() < self._limits.blocks
        expect(inside, "a block is outside the KV cache")
        expect(len(at.memories) in (0, len(tables)), "memories are one a sequence, or none")

    def padded(self, given: Given, to: Mapping[str, int]) -> Given:
        """With so many rows of each space; what is added changes no other row."""
        indices, values = {}, {}
        for index, use in self._uses.items():
            old, count = given.indices[index.name], to[index.rows]
            new = np.full((*old.shape[:-1], count), -(use.fill == "none"), np.int32)
            if use.fill == "own":
                new[:] = np.arange(count)
            new[..., : old.shape[-1]] = old
            indices[index.name] = new
        for value in self._program.inputs:
            floats = given.values[value.name]
            more = to[value.rows] - len(floats)
            values[value.name] = np.pad(floats, ((0, more), (0, 0)))
        return replace(given, indices=indices, values=values)


def _narrowed(found: NDArray[np.integer[Any]], name: str) -> Int32:
    """As int32, which indices may come wider than."""
    expect(found.dtype.kind in "iu", f"the index {name} is not of whole numbers")
    narrow = found.astype(np.int32, copy=False)
    expect((narrow == found).all(), f"a number of the index {name} does not fit int32")
    return narrow


def _there(sight: _Sight, rows: Mapping[str, int], at: Sequences) -> NDArray[np.int64] | int:
    """How many positions there are for each row to see."""
    if sight.of == "run":
        return rows[sight.space]
    counts = np.diff(at.bounds)
    if sight.of == "cache":
        ends = at.positions[at.bounds[1:] - 1].astype(np.int64) + 1
    else:
        unlimited = 2**31
        memories = at.memories or (None,) * len(counts)
        ends = np.array([getattr(memory, "rows", unlimited) for memory in memories], np.int64)
    return np.repeat(ends, counts)


def _segments(mixture: Int32) -> list[Segment]:
    if not len(mixture) or mixture.max() < 0:
        return []
    starts = [0, *(np.flatnonzero(np.diff(mixture)) + 1).tolist(), len(mixture)]
    found = zip(starts, starts[1:], mixture[starts[:-1]].tolist(), strict=False)
    return [segment for segment in found if segment[2] >= 0]


def _groups(first: Int32) -> list[Int32]:
    shared = np.unique(first[first != np.arange(len(first))])
    return [np.flatnonzero(first == one).astype(np.int32) for one in shared]


def staged(arrays: Mapping[str, NDArray[np.generic]], *, pinned: bool) -> tuple[Tensor, Places]:
    """All arrays in one buffer, of int32 and float32."""
    places, end = [], 0
    for name, array in arrays.items():
        places.append((name, array.dtype == np.float32, array.shape, end))
        end += -(-array.size // 4) * 4  # tensors begin at whole 16 bytes
    buffer = torch.empty(end, dtype=torch.int32, device="cpu", pin_memory=pinned)
    flat = buffer.numpy()
    for (_, _, _, start), array in zip(places, arrays.values(), strict=True):
        flat[start : start + array.size] = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    return buffer, tuple(places)


def views(buffer: Tensor, places: Places) -> dict[str, Tensor]:
    """The arrays as tensors of a buffer on the device."""
    found = {}
    for name, floats, shape, start in places:
        size = int(np.prod(shape))
        part = buffer[start : start + size]
        found[name] = (part.view(torch.float32) if floats else part).view(shape)
    return found
