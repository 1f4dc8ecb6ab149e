"""Attention of rows over what their sequences have stored, over each other, over memories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from squall import program as p
from squall.batch import Sequences
from squall.gpu import uses_triton

Pair = tuple[Tensor, Tensor]
"""Keys and values, or the first position that each row sees and one past the last."""

TILE_ROWS = 128
SHORT_ROWS = 16
"""Sequences with so many rows in a step are read in parts side by side: there is nothing else to
keep a GPU busy with."""
_POSITIONS, _LANES, _CHUNK = 128, 16, 256
_WIDEST = 256  # head of which Triton's tiles fit a GPU's shared memory


@dataclass(frozen=True, slots=True)
class Shape:
    """What sizes grids and tensors of a step; equal shapes may replay one CUDA graph.

    width: blocks in a row of the tables. longest: a context. Both rounded up to a power of two.
    short, long: how many tiles are of sequences with few rows, and of others.
    most: rows in a tile of the short, rounded up to a power of two.
    """

    rows: int
    sequences: int
    width: int
    longest: int
    short: int
    long: int
    most: int


@dataclass(frozen=True)
class Rows:
    """A layout on a device. kept: bounds, if the host need not ask for them."""

    tensors: Mapping[str, Tensor]
    shape: Shape
    block_size: int
    kept: Sequence[int] | None = None

    @cached_property
    def bounds(self) -> Sequence[int]:
        """As in `Sequences`."""
        return self.tensors["bounds"].tolist() if self.kept is None else self.kept


class Cache:
    """Keys and values of one layer, by slot."""

    def __init__(
        self, slots: int, layer: p.CacheLayer, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (slots, layer.kv_heads, layer.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def layout(
    sequences: Sequences, block_size: int, *, rows: int | None = None
) -> tuple[dict[str, NDArray[np.int32]], Shape]:
    """Where rows stand, for `Rows`.

    rows: so many, with padding at the end. Each padding row is a sequence of its own with no
        context: nothing of it is stored, and it gets zeros.
    """
    positions, bounds, tables = sequences.positions, sequences.bounds, sequences.block_tables
    real, counts = len(positions), np.diff(bounds)
    padding = 0 if rows is None else rows - real
    owners = np.repeat(np.arange(len(counts)), counts)
    last = positions[np.maximum(bounds[1:] - 1, 0)] if real else np.zeros(len(counts), np.int32)
    contexts = np.where(counts > 0, last + 1, 0)
    width = _power(tables.shape[1])
    short, long = _tiles(bounds.tolist(), padding)
    shape = Shape(
        rows=real + padding,
        sequences=len(counts) + padding,
        width=width,
        longest=_power(int(contexts.max(initial=1))),
        short=len(short),
        long=len(long),
        most=_power(max((count for _, _, count in short), default=1)),
    )
    slots = tables[owners, positions // block_size] * block_size + positions % block_size
    spare = ((0, padding), (0, width - tables.shape[1]))
    arrays = {
        "positions": np.pad(positions, (0, padding), constant_values=-1),
        "slots": np.pad(slots, (0, padding), constant_values=-1),
        "ends": np.pad(contexts[owners], (0, padding)),
        "bounds": np.pad(bounds, (0, padding), mode="edge"),
        "tables": np.pad(tables, spare),
        "tiles": np.array([*short, *long], np.int32).reshape(-1, 3),
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}, shape


def _tiles(bounds: list[int], padding: int) -> tuple[list[tuple[int, int, int]], ...]:
    """(sequence, first row, rows): of sequences with few rows and of padding, and of others."""
    short: list[tuple[int, int, int]] = []
    long: list[tuple[int, int, int]] = []
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        found = short if stop - start <= SHORT_ROWS else long
        for first in range(start, stop, TILE_ROWS):
            found.append((sequence, first, min(TILE_ROWS, stop - first)))
    short += [(len(bounds) - 1 + row, bounds[-1] + row, 1) for row in range(padding)]
    return short, long


def _power(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def store(cache: Cache, k: Tensor, v: Tensor, rows: Rows) -> None:
    """Put k and v, [rows, kv_heads * head_dim], where they belong."""
    if uses_triton(k):
        from squall.gpu import triton_attention

        triton_attention.store(cache, k, v, rows)
        return
    real = rows.bounds[-1]
    slots = rows.tensors["slots"][:real].long()
    for own, new in ((cache.k, k), (cache.v, v)):
        own[slots] = new[:real].reshape(real, *own.shape[1:]).to(own.dtype)


def attend(
    op: p.Attend, q: Tensor, cache: Cache, spans: Tensor, rows: Rows, *, exact: bool
) -> Tensor:
    """Attention of q, [rows, heads * head_dim], to what is stored of each row's sequence."""
    if uses_triton(q):
        from squall.gpu import triton_attention

        return triton_attention.attend(op, q, cache, spans, rows, exact=exact)
    out, tensors = torch.zeros_like(q), rows.tensors
    seen = _seen(op, spans, tensors["positions"], tensors["ends"])
    for sequence, (start, stop) in enumerate(pairwise(rows.bounds)):
        if start < stop:
            past = torch.arange(int(tensors["ends"][start]), device=q.device)
            blocks = tensors["tables"][sequence].long()[past // rows.block_size]
            slots = blocks * rows.block_size + past % rows.block_size
            stored = cache.k[slots], cache.v[slots]
            own = slice(start, stop)
            out[own] = _attend(op, q[own], stored, (seen[0][own], seen[1][own]), exact)
    return out


def attend_here(  # noqa: PLR0913
    op: p.Attend, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, *, exact: bool,
    relative: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q to the rows of k and v, which may be others than its own.

    relative: what is added to scores, [distances, heads], from the farthest before to that behind.
    """
    if relative is None and op.head_dim <= _WIDEST and uses_triton(q):
        from squall.gpu import triton_attention

        return triton_attention.attend_here(op, q, k, v, spans, exact=exact)
    own = torch.arange(len(q), dtype=torch.int32, device=q.device)
    seen = _seen(op, spans, own, torch.full_like(own, len(k)))
    return _attend(op, q, (_heads(k, op.kv_heads), _heads(v, op.kv_heads)), seen, exact, relative)


def recall(
    op: p.Recall,
    q: Tensor,
    memories: Sequence[Pair | None],
    seen: Tensor,
    rows: Rows,
    *,
    exact: bool,
) -> Tensor:
    """Attention of q to the memory of each row's sequence; zeros where there is none."""
    out = torch.zeros_like(q)
    here = p.Attend(
        op.out, op.q, op.q, op.q, op.seen, None,
        op.heads, op.kv_heads, op.head_dim, op.scale, None, None,
    )  # fmt: skip
    for memory, (start, stop) in zip(memories, pairwise(rows.bounds), strict=False):
        if memory is not None and start < stop:
            own = slice(start, stop)
            out[own] = attend_here(here, q[own], *memory, seen[:, own], exact=exact)
    return out


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(len(x), heads, x.shape[1] // heads)


def _seen(op: p.Attend, spans: Tensor, positions: Tensor, ends: Tensor) -> Pair:
    begin, end = spans[0], torch.minimum(spans[1], ends)
    if op.window is not None:
        begin = torch.maximum(begin, positions + (1 - op.window))
    return begin.clamp(min=0), end


def _attend(
    op: p.Attend, q: Tensor, stored: Pair, seen: Pair, exact: bool, relative: Tensor | None = None
) -> Tensor:
    """Some rows at a time: that bounds memory, and leaves out what none of them sees."""
    way = _tiled if exact or op.softcap is not None else _fused
    out, (begin, end) = torch.empty_like(q), seen
    for first in range(0, len(q), _CHUNK):
        own = slice(first, first + _CHUNK)
        near = None if relative is None else partial(_near, relative, first, len(q[own]))
        seen = begin[own], end[own]
        out[own] = way(op, _heads(q[own], op.heads), stored, seen, near).flatten(1)
    return out


Near = Callable[[Tensor], Tensor] | None
"""Of some positions, what is added to the scores of rows, [heads, rows, positions]."""


def _near(relative: Tensor, first: int, rows: int, positions: Tensor) -> Tensor:
    reach = len(relative) // 2
    own = torch.arange(first, first + rows, device=positions.device)
    apart = (positions - own[:, None]).clamp(-reach, reach) + reach
    return relative[apart].permute(2, 0, 1)


def _range(seen: Pair) -> tuple[int, int]:
    """The first position that any row sees, and one past the last."""
    begin, end = (x[seen[0] < seen[1]] for x in seen)
    return (int(begin.min()), int(end.max())) if len(begin) else (0, 0)


def _fused(op: p.Attend, q: Tensor, stored: Pair, seen: Pair, near: Near = None) -> Tensor:
    first, last = _range(seen)
    if first == last:
        return torch.zeros_like(q)
    k, v = (x[None, first:last].to(q.dtype).transpose(1, 2) for x in stored)
    at = torch.arange(first, last, device=q.device)
    sees = mask = (seen[0][:, None] <= at) & (at < seen[1][:, None])
    if near is not None:
        mask = near(at).masked_fill(~sees, -torch.inf).to(q.dtype)
    out = functional.scaled_dot_product_attention(
        q[None].transpose(1, 2), k, v, mask, scale=op.scale, enable_gqa=op.heads > op.kv_heads
    )
    return torch.where(sees.any(1)[:, None, None], out[0].transpose(0, 1), 0.0)


def _tiled(op: p.Attend, q: Tensor, stored: Pair, seen: Pair, near: Near = None) -> Tensor:
    """Position tiles from 0 on, merged in order, by products of one shape: exact."""
    n, group = len(q), op.heads // op.kv_heads
    lanes = q.float().view(n, op.kv_heads, group, -1).transpose(0, 1).flatten(1, 2)
    spare = -n * group % _LANES + (_LANES if op.kv_heads == 1 and n * group <= _LANES else 0)
    tiles = functional.pad(lanes, (0, 0, 0, spare)).view(op.kv_heads, -1, _LANES, op.head_dim)
    begin, end = (
        functional.pad(x.repeat_interleave(group), (0, spare)).view(-1, _LANES, 1) for x in seen
    )
    peak, total = (tiles.new_full((*tiles.shape[:3], 1), start) for start in (-torch.inf, 0.0))
    mixed = torch.zeros_like(tiles)
    first, last = _range(seen)
    for at in range(first // _POSITIONS * _POSITIONS, last, _POSITIONS):
        k, v = (_tile(x[at : at + _POSITIONS]) for x in stored)
        scores = _products(tiles, k.transpose(1, 2)).mul_(op.scale)
        past = torch.arange(at, at + _POSITIONS, device=q.device)
        if near is not None:
            more = near(past).unflatten(0, (op.kv_heads, group)).transpose(1, 2).flatten(1, 2)
            scores.add_(functional.pad(more, (0, 0, 0, spare)).view_as(scores))
        if op.softcap is not None:
            scores = scores.div_(op.softcap).tanh_().mul_(op.softcap)
        scores.masked_fill_((past < begin) | (past >= end), -torch.inf)
        top = torch.maximum(peak, scores.amax(-1, keepdim=True))
        base = top.clamp(min=torch.finfo(top.dtype).min)
        weights, old = scores.sub_(base).exp_(), (peak - base).exp_()
        total = total * old + weights.sum(-1, keepdim=True)
        mixed = mixed.mul_(old).add_(_products(weights, v))
        peak = top
    mixed = (mixed / total.clamp(min=torch.finfo(total.dtype).tiny)).flatten(1, 2)[:, : n * group]
    return mixed.reshape(-1, n, group, op.head_dim).transpose(0, 1).reshape(q.shape).to(q.dtype)


def _tile(x: Tensor) -> Tensor:
    """[kv_heads, positions, head_dim], with zeros after the last."""
    return functional.pad(x.float(), (0, 0, 0, 0, 0, _POSITIONS - len(x))).transpose(0, 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Of each head's tiles, [heads, tiles, 16, k], with its b, [heads, k, columns].

    Always several of one shape: a lone product is cut up among threads, and then its sums depend on
    how many there are; those of a batch are left whole.
    """
    if a.shape[1] == 1:
        return torch.bmm(a[:, 0], b)[:, None]
    out = a.new_empty(*a.shape[:3], b.shape[2])
    for head, tiles in enumerate(a):
        torch.bmm(tiles, b[head].expand(len(tiles), *b.shape[1:]), out=out[head])
    return out
