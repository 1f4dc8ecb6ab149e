"""A program cut for several ranks, each with a part of the heads and of the feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import gcd, lcm

from squall import program as p
from squall.errors import InvalidRequest
from squall.weights import WeightStore

# Columns that kernels like to have multiples of.
FAST = 32
Chain = list[p.Linear | p.Normalize | p.Rotate]


def shard(program: p.Program, store: WeightStore, rank: int, size: int) -> p.Program:
    """What one of `size` ranks runs, with sums over all of them; without adapters.

    Query heads go with the KV heads that they share, gates and ups with the columns of downs. What
    cannot be shared out, every rank computes: queries and keys that are normalized by the row, what
    has fewer heads than there are ranks, or fewer blocks of its number format. All but the first
    rank end at the last sum, and give no outputs. Raises InvalidRequest if nothing is shared.
    """
    program = replace(program, ops=tuple(map(_without_adapters, program.ops)))
    edit = _Edit(program, store, rank, size)
    for op in program.ops:
        match op:
            case p.Attend():
                edit.attention(op)
            case p.Linear():
                edit.feed_forward(op)
            case p.MixtureOfExperts():
                edit.experts(op)
    if program.memories or not edit.sums:
        why = "it recalls images" if program.memories else "it has too few heads and columns"
        raise InvalidRequest(
            f"this model cannot be shared out to {size} ranks, as {why}; choose fewer, or run "
            "whole layers on each device"
        )
    return edit.program()


class _Edit:
    """sums: what ranks have of the values that are sums now."""

    def __init__(self, program: p.Program, store: WeightStore, rank: int, size: int) -> None:
        self._program, self._store, self._rank, self._size = program, store, rank, size
        self._ops = {op.out: op for op in program.ops}
        self._readers: dict[p.Value, list[p.Op]] = {}
        for op in program.ops:
            for value in p.reads(op):
                self._readers.setdefault(value, []).append(op)
        self._narrow: dict[p.Value, p.Value] = {}
        self._caches = list(program.caches)
        self.sums: dict[p.Value, p.Value] = {}

    # ---- what is shared out ----

    def attention(self, op: p.Attend) -> None:
        """The heads of one attention, if they can be."""
        if op.relative is not None:
            return
        chains = [self._chain(value, op.head_dim) for value in (op.q, op.k, op.v)]
        reader = self._reader(op.out)
        out = self._reader(reader.out) if isinstance(reader, p.GatherRows) else reader
        if not isinstance(out, p.Linear) or out.activation or not all(chains):
            return
        shares = self._heads(op, self._store.cuttable(out.weight)[1])
        if shares is None:
            return
        kv, q = shares
        for chain, heads in zip(chains, (q, kv, kv), strict=True):
            for link in chain:
                self._cut(link, heads, op.head_dim)
        self._ops[op.out] = replace(op, heads=q.size, kv_heads=kv.size)
        for value in {op.out, out.x}:
            self._resize(value, q.size * op.head_dim)
        if op.cache is not None:
            self._caches[op.cache] = p.CacheLayer(kv.size, op.head_dim)
        self._sum(out, _times(q, op.head_dim))

    def feed_forward(self, down: p.Linear) -> None:
        """The columns of a down, and the rows of what makes them."""
        if down.activation or down.taps or self._reader(down.x) is not down:
            return
        names: tuple[str, ...] = "gate", "up", "gate_bias", "up_bias"
        match self._ops.get(down.x):
            case p.GatedLinear() as inner:
                pass
            case p.Linear(activation=str(), residual=None) as inner:
                names = ("weight", "bias")
            case _:
                return
        share = self._columns(down.weight)
        if share is not None:
            self._rows(inner, share, names)
            self._resize(inner.out, share.size)
            self._sum(down, share)

    def experts(self, op: p.MixtureOfExperts) -> None:
        """Of every expert what a feed-forward would be; each rank routes all rows."""
        share = self._columns(op.down)
        if share is None or op.gate_bias or op.up_bias or op.down_bias:
            return
        self._rows(op, share, ("gate", "up"))
        self._sum(op, share)

    def _heads(self, op: p.Attend, grain: int) -> tuple[p.Part, p.Part] | None:
        """This rank's KV heads and heads, whose columns are whole blocks of `grain`."""
        group = op.heads // op.kv_heads
        if self._size > op.kv_heads and self._size % op.kv_heads == 0:  # ranks have one in common
            q = self._share(op.heads, grain // gcd(grain, op.head_dim))
            if op.heads % self._size or q is None or q.size * self._size != op.heads:
                return None
            return p.Part(first := q.start // group, first + 1, op.kv_heads), q
        width = group * op.head_dim
        kv = self._share(op.kv_heads, grain // gcd(grain, width))
        return None if kv is None else (kv, _times(kv, group))

    def _columns(self, weight: p.Matrix) -> p.Part | None:
        grain, cols = self._store.cuttable(weight)[1], weight.cols
        fast = lcm(grain, FAST)
        even = cols % (fast * self._size) == 0 or cols // fast >= FAST
        return self._share(cols, fast if even and cols % fast == 0 else grain)

    def _share(self, count: int, unit: int) -> p.Part | None:
        """Of so many things, in units that stay together, as even as can be."""
        units = count // unit
        if units < self._size:
            return None
        start, stop = (units * rank // self._size * unit for rank in (self._rank, self._rank + 1))
        return p.Part(start, stop, count)

    # ---- what the program looks like ----

    def _reader(self, value: p.Value) -> p.Op | None:
        """The only op that reads it."""
        readers = self._readers.get(value, [])
        return readers[0] if len(readers) == 1 else None

    def _chain(self, value: p.Value, head_dim: int) -> Chain:
        """The ops that make the heads of an attention, head by head; empty: there are others."""
        chain: Chain = []
        while self._reader(value) is not None:
            match self._ops.get(value):
                case p.Rotate() | p.Normalize() as op:
                    if isinstance(op, p.Normalize) and op.group != head_dim:
                        return []
                    chain.append(op)
                    value = op.x
                case p.Linear(activation=None, residual=None) as op:
                    return [*chain, op]
                case _:
                    break
        return []

    # ---- edits ----

    def _cut(self, op: p.Linear | p.Normalize | p.Rotate, heads: p.Part, head_dim: int) -> None:
        """Heads of an op that treats each by itself."""
        share = _times(heads, head_dim)
        match op:
            case p.Rotate():
                self._ops[op.out] = replace(op, heads=heads.size)
            case p.Normalize() if op.weight.size != op.group:
                bias = op.bias and _elements(op.bias, share)
                self._ops[op.out] = replace(op, weight=_elements(op.weight, share), bias=bias)
            case p.Linear():
                self._rows(op, share, ("weight", "bias"))
        self._resize(op.out, share.size)

    def _rows(self, op: p.Op, share: p.Part, names: Sequence[str]) -> None:
        """Rows of an op's matrices, and elements of its biases, as far as there are some."""
        weights = ((name, getattr(op, name)) for name in names)
        self._change(op, {
            name: _elements(weight, share)
            if isinstance(weight, p.Vector)
            else replace(weight, rows=share.size, rows_of=share)
            for name, weight in weights
            if weight is not None
        })  # fmt: skip

    def _sum(self, op: p.Linear | p.MixtureOfExperts, share: p.Part) -> None:
        """The op by columns, then a sum; the residual and the bias are the first rank's."""
        name = "weight" if isinstance(op, p.Linear) else "down"
        weight, _ = self._store.cuttable(getattr(op, name))
        number = len(self._program.values) + len(self.sums)
        part = replace(op.out, id=number, name=f"{op.out.name}.part")
        cut = {name: replace(weight, cols=share.size, cols_of=share), "out": part}
        of_first = ("residual", "bias") if isinstance(op, p.Linear) else ("residual",)
        self._change(op, cut | (dict.fromkeys(of_first) if self._rank else {}))
        self.sums[op.out] = part

    def _change(self, op: p.Op, changes: Mapping[str, object]) -> None:
        self._ops[op.out] = replace(self._ops[op.out], **changes)  # type: ignore[arg-type]

    def _resize(self, value: p.Value, width: int) -> None:
        self._narrow[value] = replace(value, width=width)

    def program(self) -> p.Program:
        """The program as edited."""
        ops: list[p.Op] = []
        for out, op in self._ops.items():
            ops.append(self._renamed(op))
            if out in self.sums:
                ops.append(p.AllReduce(out, self.sums[out]))
        outputs = self._program.outputs
        if self._rank > 0:
            last = max(i for i, op in enumerate(ops) if isinstance(op, p.AllReduce))
            ops, outputs = ops[: last + 1], ()
        made = {*(op.out for op in ops), *self._program.inputs}
        values = (self._narrow.get(v, v) for v in (*self._program.values, *self.sums.values()))
        return replace(
            self._program, ops=tuple(ops), values=tuple(v for v in values if v in made),
            outputs=outputs, caches=tuple(self._caches),
        )  # fmt: skip

    def _renamed(self, op: p.Op) -> p.Op:
        """The op with values as wide as they are now."""
        given = ((f.name, getattr(op, f.name)) for f in fields(op))
        values = ((name, item) for name, item in given if isinstance(item, p.Value))
        narrow = {name: self._narrow[item] for name, item in values if item in self._narrow}
        return replace(op, **narrow) if narrow else op  # type: ignore[arg-type]


def _without_adapters(op: p.Op) -> p.Op:
    if isinstance(op, p.Embed | p.Linear | p.GatedLinear | p.MixtureOfExperts):
        return replace(op, adapters=None)
    return op


def _elements(vector: p.Vector, share: p.Part) -> p.Vector:
    return replace(vector, size=share.size, part=share)


def _times(part: p.Part, width: int) -> p.Part:
    """The same of things that are `width` times as many."""
    return p.Part(part.start * width, part.stop * width, part.whole * width)
