"""Attention as Triton kernels: one that walks what rows see, one that merges what it left in parts.

A program has the heads of one KV head for some rows of a sequence: they share its keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from squall import program as p
from squall.gpu import attention

PART = 256
"""Positions that are added up by themselves, then merged in order: in one program or by several."""
_FEW_PROGRAMS = 1024
_SUMS_LIMIT = 1 << 26
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tiling:
    """lanes: rows times heads of a program. positions: of a step of its loop."""

    lanes: int
    positions: int
    warps: int
    stages: int


def tiling(dtype: torch.dtype, head_dim: int, short: bool, exact: bool) -> Tiling:
    """What a program takes on; for exact results the same for few rows as for many."""
    wide = head_dim > 128
    if dtype == torch.float32:
        return Tiling(16, 32, 4, 1 if wide else 2)
    positions = 32 if wide else 64
    if exact:
        return Tiling(64, positions, 8 if wide else 4, 2)
    return Tiling(16, positions, 4, 3) if short else Tiling(64 if wide else 128, positions, 8, 2)


def store(cache: attention.Cache, k: Tensor, v: Tensor, rows: attention.Rows) -> None:
    width = k.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    _store[len(k), triton.cdiv(width, block)](
        cache.k, cache.v, k, v, rows.tensors["slots"], k.stride(0), v.stride(0), width, block
    )


def attend(
    op: p.Attend, q: Tensor, cache: attention.Cache, spans: Tensor, rows: attention.Rows,
    *, exact: bool,
) -> Tensor:  # fmt: skip
    out, shape, tiles = torch.empty_like(q), rows.shape, rows.tensors["tiles"]
    short = tiles, shape.short, shape.most, shape.longest
    long = tiles[shape.short :], shape.long, attention.TILE_ROWS, shape.longest
    for where in (short, long):
        if where[1]:
            _attend(op, (q, cache.k, cache.v, out), spans, where, rows, exact)
    return out


def attend_here(
    op: p.Attend, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, *, exact: bool
) -> Tensor:
    out, n = torch.empty_like(q), len(q)
    if n:
        most = min(triton.next_power_of_2(n), attention.TILE_ROWS)
        where = spans, triton.cdiv(n, most), most, len(k)
        _attend(op, (q, k.contiguous(), v.contiguous(), out), spans, where, None, exact)
    return out


def _attend(
    op: p.Attend, tensors: tuple[Tensor, ...], spans: Tensor, where: tuple[Tensor, int, int, int],
    rows: attention.Rows | None, exact: bool,
) -> None:  # fmt: skip
    """where: tiles, how many, of up to how many rows, and the longest context.

    rows: of a cache; None: tiles are one after another, and see the first keys.
    """
    q, k, v, out = tensors
    tiles, count, most, longest = where
    group, few = op.heads // op.kv_heads, most <= attention.SHORT_ROWS
    tile = tiling(q.dtype, op.head_dim, few, exact)
    lanes = min(group, tile.lanes)
    grid = (
        count * triton.cdiv(most, tile.lanes // lanes),
        op.kv_heads * triton.cdiv(group, lanes),
    )
    parts = triton.cdiv(longest, PART)
    slots = count * most * op.heads * parts
    split = few and parts > 1 and grid[0] * grid[1] < _FEW_PROGRAMS
    split = split and slots * op.head_dim <= _SUMS_LIMIT
    sums = out.new_empty(slots * (op.head_dim + 2) if split else 1, dtype=torch.float32)
    given = {} if rows is None else rows.tensors
    positions, ends, tables = (given.get(x, spans) for x in ("positions", "ends", "tables"))
    seen = (spans, spans.stride(0), positions, ends, tiles, len(q), longest, most)
    constants = {
        "HEADS": op.heads, "HEAD_DIM": op.head_dim, "WINDOW": op.window or 0, "PART": PART,
        "WIDTH": max(triton.next_power_of_2(op.head_dim), 16), "CACHED": rows is not None,
        "enable_fp_fusion": not exact,
    }  # fmt: skip
    scale, cap = op.scale * _LOG2E, op.softcap
    _walk[(*grid, parts if split else 1)](
        q, k, v, out, sums, *seen, parts, slots, tables, rows.shape.width if rows else 0,
        q.stride(0), k.stride(0), scale if cap is None else 2 * scale / cap, (cap or 0) * _LOG2E,
        GROUP=group, LANES=lanes, ROWS=tile.lanes // lanes, M=tile.lanes, N=tile.positions,
        BLOCK=rows.block_size if rows else 1, SPLIT=split, FOLD=exact and parts > 1,
        CAP=cap is not None, num_warps=tile.warps, num_stages=tile.stages, **constants,
    )  # fmt: skip
    if split:
        _merge[count * most, op.heads](sums, out, *seen, parts, slots, **constants, num_warps=1)


@triton.jit
def _store(k_to, v_to, k, v, slots, k_stride, v_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        key = tl.load(k + row * k_stride + at, mask=inside)
        value = tl.load(v + row * v_stride + at, mask=inside)
        tl.store(k_to + slot * width + at, key.to(k_to.dtype.element_ty), mask=inside)
        tl.store(v_to + slot * width + at, value.to(v_to.dtype.element_ty), mask=inside)


@triton.jit
def _tile(tiles, tile, rows, most, CACHED: tl.constexpr):
    """Its sequence, first row, and how many rows."""
    if CACHED:
        at = tiles + tile * 3
        return tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return 0, tile * most, tl.minimum(most, rows - tile * most)


@triton.jit
def _seen(
    spans, stride, positions, ends, row, valid, keys, WINDOW: tl.constexpr, CACHED: tl.constexpr
):
    """What a row sees: from where, and up to where; 0 and 0 if nothing."""
    begin = tl.maximum(tl.load(spans + row, mask=valid, other=0), 0)
    end = tl.load(spans + stride + row, mask=valid, other=0)
    own = row
    if CACHED:
        own = tl.load(positions + row, mask=valid, other=0)
        end = tl.minimum(end, tl.load(ends + row, mask=valid, other=0))
    else:
        end = tl.minimum(end, keys)
    if WINDOW > 0:
        begin = tl.maximum(begin, own + 1 - WINDOW)
    some = begin < end
    return tl.where(some, begin, 0), tl.where(some, end, 0)


@triton.jit
def _fold(top, total, mixed, peak, part_total, part_mixed):
    """Sums up to here and those of a part, as one."""
    new = tl.maximum(top, peak)
    base = tl.where(new == float("-inf"), 0.0, new)
    old, more = tl.exp2(top - base), tl.exp2(peak - base)
    return (
        new,
        total * old + part_total * more,
        mixed * old[:, None] + part_mixed * more[:, None],
    )


@triton.jit
def _finish(out, row, column, mask, total, mixed):
    # Adding 0 leaves no -0, whose sign would tell of tiles that only other rows see.
    mixed = mixed / tl.where(total == 0, 1.0, total)[:, None] + 0.0
    tl.store(out + row[:, None] + column[None, :], mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tanh(double):
    """Of half of what `double` is by log2(e)."""
    e = tl.exp2(-tl.abs(double))
    t = (1 - e) / (1 + e)
    return tl.where(double < 0, -t, t)


@triton.jit
def _nothing(M: tl.constexpr, WIDTH: tl.constexpr):
    """Peak, total and mixed before the first position."""
    none = tl.full([M], float("-inf"), tl.float32)
    return none, tl.zeros([M], tl.float32), tl.zeros([M, WIDTH], tl.float32)


@triton.jit
def _range(begin, end, SPLIT: tl.constexpr, PART: tl.constexpr):
    """From where and up to where any row sees; of a part, if split."""
    low = tl.min(tl.where(end > 0, begin, 2147483647))
    high = tl.max(end)
    if SPLIT:
        low = tl.maximum(low, tl.program_id(2) * PART)
        high = tl.minimum(high, (tl.program_id(2) + 1) * PART)
    else:
        low = tl.minimum(low, high)
    return low, high


@triton.jit
def _scores(asked, key, past, begin, end, scale, cap, CAP: tl.constexpr):
    scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
    if CAP:
        scores = _tanh(scores) * cap
    sees = (begin[:, None] <= past[None, :]) & (past[None, :] < end[:, None])
    return tl.where(sees, scores, float("-inf"))


@triton.jit
def _slot(table, past, inside, BLOCK: tl.constexpr, CACHED: tl.constexpr):
    """Where keys and values of positions are."""
    slot = past.to(tl.int64)
    if CACHED:
        block = tl.load(table + past // BLOCK, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK + past % BLOCK
    return slot


@triton.jit
def _mix(scores, values, there, peak, total, mixed, TYPE: tl.constexpr):
    """Peak, total and mixed with some positions more."""
    top = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    weights, old = tl.exp2(scores - base[:, None]), tl.exp2(peak - base)
    value = tl.load(values, mask=there, other=0.0).to(TYPE)
    total = total * old + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(TYPE), value, mixed * old[:, None], input_precision="ieee")
    return top, total, mixed


@triton.jit
def _keep(own, ends_at, valid, mask, peak, total, mixed):
    tl.store(own, mixed, mask=mask)
    tl.store(ends_at, peak, mask=valid)
    tl.store(ends_at + 1, total, mask=valid)


@triton.jit(
    do_not_specialize=["span_stride", "rows", "keys", "most", "table_width", "parts", "slots"]
)
def _walk(
    q, k, v, out, sums, spans, span_stride, positions, ends, tiles, rows, keys, most, parts, slots,
    tables, table_width, q_stride, k_stride, scale, cap,
    GROUP: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, FOLD: tl.constexpr, CAP: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    CACHED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Programs: rows of a tile; a KV head, or some of the heads that share it; a part, if split."""
    pieces = tl.cdiv(most, ROWS)
    tile = tl.program_id(0) // pieces
    sequence, first, count = _tile(tiles, tile, rows, most, CACHED)
    start = tl.program_id(0) % pieces * ROWS
    if start >= count:
        return
    SHARES: tl.constexpr = (GROUP + LANES - 1) // LANES
    kv_head = tl.program_id(1) // SHARES
    lane = tl.arange(0, M)
    member = tl.program_id(1) % SHARES * LANES + lane % LANES
    at_row = start + lane // LANES
    valid = (lane < ROWS * LANES) & (at_row < count) & (member < GROUP)
    row, head = first + at_row, kv_head * GROUP + member
    begin, end = _seen(spans, span_stride, positions, ends, row, valid, keys, WINDOW, CACHED)
    low, high = _range(begin, end, SPLIT, PART)
    if SPLIT:  # noqa: SIM102
        if low >= high:
            return
    column = tl.arange(0, WIDTH)
    across = (column < HEAD_DIM)[None, :]
    mask = valid[:, None] & across
    own = row.to(tl.int64)[:, None] * q_stride + (head * HEAD_DIM)[:, None] + column[None, :]
    asked = tl.load(q + own, mask=mask, other=0.0)
    peak, total, mixed = _nothing(M, WIDTH)
    if FOLD and not SPLIT:
        all_peak, all_total, all_mixed = peak, total, mixed
    of_head = kv_head * HEAD_DIM + column[None, :]
    for step in range(low // N, tl.cdiv(high, N)):
        if FOLD and not SPLIT:  # noqa: SIM102
            if step % (PART // N) == 0:
                all_peak, all_total, all_mixed = _fold(
                    all_peak, all_total, all_mixed, peak, total, mixed
                )
                peak, total, mixed = _nothing(M, WIDTH)
        past = step * N + tl.arange(0, N)
        inside = past < high
        slot = _slot(tables + sequence * table_width, past, inside, BLOCK, CACHED)
        source = slot[:, None] * k_stride + of_head
        key = tl.load(k + source, mask=inside[:, None] & across, other=0.0).to(asked.dtype)
        scores = _scores(asked, key, past, begin, end, scale, cap, CAP)
        values, there = v + source, inside[:, None] & across
        peak, total, mixed = _mix(scores, values, there, peak, total, mixed, asked.dtype)
    if SPLIT:
        place = ((tile * most + at_row) * HEADS + head).to(tl.int64) * parts + tl.program_id(2)
        own = sums + place[:, None] * HEAD_DIM + column[None, :]
        ends_at = sums + slots.to(tl.int64) * HEAD_DIM + place * 2
        _keep(own, ends_at, valid, mask, peak, total, mixed)
    else:
        if FOLD:
            peak, total, mixed = _fold(all_peak, all_total, all_mixed, peak, total, mixed)
        _finish(out, (row.to(tl.int64) * HEADS + head) * HEAD_DIM, column, mask, total, mixed)


@triton.jit(do_not_specialize=["span_stride", "rows", "keys", "most", "parts", "slots"])
def _merge(
    sums, out, spans, span_stride, positions, ends, tiles, rows, keys, most, parts, slots,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr,
    CACHED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Programs: rows of a tile; heads."""
    _, first, count = _tile(tiles, tl.program_id(0) // most, rows, most, CACHED)
    if tl.program_id(0) % most >= count:
        return
    one = tl.arange(0, 1)
    row = first + tl.program_id(0) % most + one
    begin, end = _seen(spans, span_stride, positions, ends, row, one == 0, keys, WINDOW, CACHED)
    column = tl.arange(0, WIDTH)
    mask = (one == 0)[:, None] & (column < HEAD_DIM)[None, :]
    peak, total, mixed = _nothing(1, WIDTH)
    place = (tl.program_id(0) * HEADS + tl.program_id(1) + one).to(tl.int64) * parts
    own = sums + place[:, None] * HEAD_DIM + column[None, :]
    ends_at = sums + slots.to(tl.int64) * HEAD_DIM + place * 2
    for part in tl.range(tl.min(begin) // PART, tl.cdiv(tl.max(end), PART), num_stages=4):
        peak, total, mixed = _fold(
            peak, total, mixed, tl.load(ends_at + part * 2), tl.load(ends_at + part * 2 + 1),
            tl.load(own + part * HEAD_DIM, mask=mask),
        )  # fmt: skip
    at = (row.to(tl.int64) * HEADS + tl.program_id(1)) * HEAD_DIM
    _finish(out, at, column, mask, total, mixed)
