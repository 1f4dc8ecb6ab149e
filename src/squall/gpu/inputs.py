"""What a run is given: checked on the host, so that no device sees a bad index; and staged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squall import program as p
from squall.batch import Int32, Sequences
from squall.errors import InvalidRequest
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


# What positions are of, beside row spaces: those of a sequence, and of what it recalls.
_CACHE, _MEMORY = "(cache)", "(memory)"


def _bounds(op: p.Op) -> Iterator[tuple[p.Index, int, int | str, str]]:
    """Of an index the least and the most, a number or how many rows a space has; and the error."""
    match op:
        case p.Embed():
            yield op.index, 0, op.table.rows, "a token id is outside the vocabulary"
        case p.RopeAngles():
            yield op.positions, 0, 1 << 31, "an index is negative"
        case p.GatherRows():
            yield op.index, 0, op.x.rows, "a chosen row is outside the step"
        case p.Linear(taps=p.Index() as taps):
            yield taps, -(1 << 31), op.x.rows, "a chosen row is outside the step"
        case p.Overlay():
            yield op.index, -(1 << 31), op.rows.rows, "a chosen row is outside the step"


def _seen(op: p.Op) -> Iterator[tuple[p.Index, str]]:
    """What each row sees, and of what."""
    match op:
        case p.Attend():
            yield op.spans, op.k.rows if op.cache is None else _CACHE
        case p.Recall():
            yield op.seen, _MEMORY


def _alone(op: p.Op) -> Iterator[p.Value]:
    """What has one row."""
    match op:
        case p.Add(gate=p.Value() as row) | p.Modulate(by=row):
            yield row


class Inputs:
    """What a program asks of a run."""

    def __init__(self, program: p.Program, limits: Limits) -> None:
        tokens = limits.rows.get("tokens", 0)
        self._program, self._limits = program, limits
        self._most = {space: limits.rows.get(space, tokens) for space in program.spaces}
        ops = program.ops
        self._bounds = tuple(dict.fromkeys(bound for op in ops for bound in _bounds(op)))
        self._seen = tuple(dict.fromkeys(seen for op in ops for seen in _seen(op)))
        self._alone = {row.rows for op in ops for row in _alone(op)}
        self._joined = [op for op in ops if isinstance(op, p.ConcatenateRows)]
        self._mixtures = {a.mixture for op in ops if (a := getattr(op, "adapters", None))}
        self._shared = {s for op in ops if (s := getattr(op, "shared", None))}
        self._cached = {spans.rows for spans, of in self._seen if of in (_CACHE, _MEMORY)}
        self.cached = bool(self._cached)

    def checked(self, given: Given, sequences: Sequences, mixtures: int) -> Given:
        """In the shapes that ops read. Raises InvalidRequest for what is amiss."""
        rows, indices = given.rows, {}
        for space, count in rows.items():
            expect(count <= self._most[space], "too many rows in a step")
        expect(all(rows[space] == 1 for space in self._alone), "a gate or a modulation has one row")
        for op in self._joined:
            together = rows[op.out.rows] == rows[op.a.rows] + rows[op.b.rows]
            expect(together, "rows one after another are as many as there are of both")
        for index in self._program.indices:
            found = _narrowed(given.indices[index.name], index.name)
            shape = (index.axes, rows[index.rows]) if index.axes > 1 else (rows[index.rows],)
            expect(found.size == np.prod(shape), "an index differs from its rows")
            indices[index.name] = found.reshape(shape)
        for value in self._program.inputs:
            floats = given.values[value.name]
            expect(floats.dtype == np.float32, f"the input {value.name} is not of float32")
            fits = floats.shape == (rows[value.rows], value.width)
            expect(fits, f"the input {value.name} is not [rows, {value.width}]")
        for index, least, most, what in self._bounds:
            found, most = indices[index.name], rows[most] if isinstance(most, str) else most
            expect(((found >= least) & (found < most)).all(), what)
        self._check_seen(indices, rows, sequences)
        for index in self._mixtures:
            highest = indices[index.name].max(initial=-1)
            expect(highest < mixtures, "a row names adapters that are not there")
        for index in self._shared:
            found = indices[index.name]
            first = (found >= 0) & (found <= np.arange(len(found)))
            shares = first.all() and (found[found] == found).all()
            expect(shares, "rows that share must name the first of them")
        return replace(
            given,
            indices=indices,
            segments={index.name: _segments(indices[index.name]) for index in self._mixtures},
            groups={index.name: _groups(indices[index.name]) for index in self._shared},
        )

    def _check_seen(
        self, indices: Mapping[str, Int32], rows: Mapping[str, int], at: Sequences
    ) -> None:
        there: dict[str, NDArray[np.int64] | int] = {**rows}
        if self.cached:
            self._check_sequences(at, rows)
            lengths, unlimited = np.diff(at.bounds), 2**31
            memories = at.memories or (None,) * len(lengths)
            recalled = [getattr(memory, "rows", unlimited) for memory in memories]
            there[_CACHE] = np.repeat(at.positions[at.bounds[1:] - 1].astype(np.int64) + 1, lengths)
            there[_MEMORY] = np.repeat(np.array(recalled, np.int64), lengths)
        for spans, of in self._seen:
            first, last = indices[spans.name]
            ok = (first >= 0) & (first <= last) & (last <= there[of])
            expect(ok.all(), "a row sees a position that is not there")

    def _check_sequences(self, at: Sequences, rows: Mapping[str, int]) -> None:
        positions, bounds, tables = at.positions, at.bounds, at.block_tables
        count, lengths = len(positions), np.diff(bounds)
        placed = count > 0 and all(rows[space] == count for space in self._cached)
        expect(placed, "cached attention needs rows, and a position for each")
        ascend = len(lengths) and bounds[0] == 0 and bounds[-1] == count and lengths.min() >= 0
        expect(ascend, "sequence bounds must ascend from 0 to the number of rows")
        expect(tables.ndim == 2 and len(tables) == len(lengths), "one block table a sequence")
        inside = positions.min() >= 0 and positions.max() < self._program.context
        expect(inside, "a position is outside the context")
        starts = np.repeat(bounds[:-1], lengths)
        follow = positions - positions[starts] == np.arange(count) - starts
        expect(follow.all(), "positions of a sequence must ascend by one")
        last = positions[bounds[1:] - 1]
        needed = np.where(lengths > 0, last // self._limits.block_size + 1, 0)
        width = tables.shape[1]
        expect(needed.max() <= width, "a block table is shorter than its sequence")
        used = tables[np.arange(width) < needed[:, None]]
        inside = used.min() >= 0 and used.max() < self._limits.blocks
        expect(inside, "a block is outside the KV cache")
        expect(len(at.memories) in (0, len(tables)), "memories are one a sequence, or none")

    def padded(self, given: Given, to: Mapping[str, int]) -> Given:
        """With so many rows of each space; what is added changes no other row."""
        indices, values = {}, {}
        for index in self._program.indices:
            old, count = given.indices[index.name], to[index.rows]
            new = np.full((*old.shape[:-1], count), -(index in self._mixtures), np.int32)
            if index in self._shared:
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
