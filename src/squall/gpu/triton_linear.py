"""Products with weights of `gpu/matrices.py`, as Triton kernels.

One kernel multiplies tiles in tensor cores: weights are the first operand, [BN, BK], unpacked where
they are used, rows of x the second, [BK, BM]. So few rows of x waste little, and on Hopper a tile
of 64 weights' rows is one warpgroup's. With `exact`, BM is always the same, and so is the
instruction (of BM columns): a row of x is one column of it, wherever it stands. K is cut into
parts by the weight's shape alone, each added up from its begin, and the parts in order, whether by
one program or by many and a second pass. What that costs: up to 64 rows nothing but arithmetic
that waits for memory anyhow; a long prompt reads weights from L2 once for every 64 rows, and
reaches about half the rate of the widest tile.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from squall.gpu.matrices import Float8, Packed, Plain, Scales, Weight
from squall.spec import Activation

PARTED = 256  # programs that a product of few rows should have at least
LONGEST = 8  # parts of K at most
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PERMUTE = tl.constexpr([f"prmt.b32 $0, $1, $2, 0x744{t};" for t in range(4)])


@triton.jit
def _groups(values, row, start, padded, SIZE: tl.constexpr, U: tl.constexpr, BK: tl.constexpr):
    """Values of groups of SIZE columns, for every U columns from `start` on or for all BK."""
    STEP: tl.constexpr = BK if SIZE >= BK else U
    column = (start + tl.arange(0, BK // STEP)[None, :] * STEP).to(tl.uint32)
    at = row[:, None] * (padded // SIZE) + column // SIZE
    return tl.load(values + at, column < padded, other=0).to(tl.float32)


@triton.jit
def _scales(
    base, part, row, start, padded,
    BASE: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    scale = _groups(base, row, start, padded, BASE, U, BK)
    if GROUP:
        scale = scale * _groups(part, row, start, padded, GROUP, U, BK)
    return scale[:, :, None]


@triton.jit
def _plane(plane, row, start, padded, BITS: tl.constexpr, U: tl.constexpr, BK: tl.constexpr):
    """Bits of codes, four codes a word: [BN, BK // U, U // 4]."""
    RUN: tl.constexpr = 256 // BITS
    column = (start + tl.arange(0, BK // U)[None, :, None] * U).to(tl.uint32)
    word = column // U % (32 // U) * (U // 4) + tl.arange(0, U // 4)[None, None, :]
    at = row[:, None, None] * (padded // RUN * 8) + column // RUN * 8 + word
    words = tl.load(plane.to(tl.pointer_type(tl.uint32)) + at, column < padded, other=0)
    return (words >> (column % RUN // 32 * BITS)) & ((1 << BITS) - 1) * 0x01010101


@triton.jit
def _number(words, padded, t: tl.constexpr, MIDDLE: tl.constexpr):
    """The t-th byte of each word, less MIDDLE: put into the fraction of 2**23, and that taken away.

    The compiler is not to know 2**23, or it would have no room for the byte's number in the code.
    """
    if INTERPRETED:
        number = (((words >> 8 * t) & 255) | 0x4B000000).to(tl.float32, bitcast=True)
    else:
        high = 0x4B000000 + tl.minimum(padded, 0)
        number = tl.inline_asm_elementwise(
            PERMUTE[t], "=f,r,r", [words, high], tl.float32, is_pure=True, pack=1
        )
    return number - (8388608.0 + MIDDLE)


@triton.jit
def _unpacked(w, row, start, padded, FORM: tl.constexpr, BK: tl.constexpr):
    """Every fourth of weights [BN, BK] from column `start` on: four of [BN, C, U // 4] in float32."""
    U: tl.constexpr = FORM[7]
    words = _plane(w[0], row, start, padded, FORM[0], U, BK)
    if FORM[1]:
        words |= _plane(w[1], row, start, padded, FORM[1], U, BK) << FORM[0]
    scale = _scales(w[2], w[3], row, start, padded, FORM[3], FORM[4], U, BK)
    w0 = scale * _number(words, padded, 0, FORM[2])
    w1 = scale * _number(words, padded, 1, FORM[2])
    w2 = scale * _number(words, padded, 2, FORM[2])
    w3 = scale * _number(words, padded, 3, FORM[2])
    if FORM[5]:
        minimum = _scales(w[4], w[5], row, start, padded, FORM[5], FORM[6], U, BK)
        w0, w1, w2, w3 = w0 - minimum, w1 - minimum, w2 - minimum, w3 - minimum
    return w0, w1, w2, w3


@triton.jit
def _rounded(pairs, TYPE: tl.constexpr):
    """`to(TYPE)`, of neighbours at once."""
    if INTERPRETED or TYPE == tl.float32:
        rounded = pairs.to(TYPE)
    elif TYPE == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [pairs], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [pairs], tl.float16, is_pure=True, pack=2
        )
    return rounded


@triton.jit
def _tile(w, row, start, K, padded, FORM: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr):
    """Weights [BN, BK] of rows from column `start` on."""
    if FORM[0] == 0:
        k = start + tl.arange(0, BK)
        tile = tl.load(w[0] + row[:, None] * K + k[None, :], k[None, :] < K, other=0).to(TYPE)
    else:
        w0, w1, w2, w3 = _unpacked(w, row, start, padded, FORM, BK)
        four = _rounded(tl.join(tl.join(w0, w2), tl.join(w1, w3)), TYPE)
        tile = tl.reshape(four, [row.shape[0], BK])
    return tile


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = 0.5 * y * (2 - 2 / (tl.exp(2 * z) + 1))
    elif ACTIVATION == "quick_gelu":
        y = y / (1 + tl.exp(-1.702 * y))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0)
    return y


@triton.jit
def _biased(y, w, bias, row, FORM: tl.constexpr):
    """With the factors of rows, if there are, and the bias."""
    if FORM[0] == 0 and w[1] is not None:
        y *= tl.load(w[1] + row)
    if bias is not None:
        y += tl.load(bias + row)
    return y


@triton.jit
def _part(
    x, w, gate, row, xs, valid, first, last, K, padded, gate_padded,
    FORM: tl.constexpr, GATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Products of columns from `first` to `last`, [BN, BM]; of both weights, if there is a gate."""
    TYPE: tl.constexpr = x.dtype.element_ty
    y = tl.zeros([BN, BM], tl.float32)
    gated = tl.zeros([BN, BM], tl.float32)
    for start in range(first, last, BK):
        k = start + tl.arange(0, BK)
        seen = valid[None, :] & (k < K)[:, None]
        xt = tl.load(x + xs[None, :] + k[:, None], seen, other=0)
        y = tl.dot(_tile(w, row, start, K, padded, FORM, BK, TYPE), xt, y, input_precision="ieee")
        if gate is not None:
            tile = _tile(gate, row, start, K, gate_padded, GATE, BK, TYPE)
            gated = tl.dot(tile, xt, gated, input_precision="ieee")
    return y, gated


@triton.jit
def _product(
    out, x, w, gate, bias, gate_bias, residual, plan, n, N, K, padded, gate_padded, x_stride,
    scale, span, k,
    FORM: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of out [n, N]; if SPLIT, one of PARTS parts of it, which `_finish` adds up.

    plan: of experts, (rows in order of them, experts of tiles, begins, ends); a row of x is that of
        the row of out divided by k.
    """
    tiles = tl.num_programs(0) // tl.cdiv(N, BN)
    tile = tl.program_id(0) % tiles
    m = tile * BM + tl.arange(0, BM)
    rows = tl.program_id(0) // tiles * BN + tl.arange(0, BN)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    valid = m < n
    stop = K
    if plan is not None:
        m = tl.load(plan[2] + tile) + tl.arange(0, BM)
        valid = m < tl.load(plan[3] + tile)
        m = tl.load(plan[0] + m, valid, other=0)
        row += tl.load(plan[1] + tile).to(tl.int64) * N
        stop = tl.where(tl.load(plan[3] + tile) > tl.load(plan[2] + tile), K, 0)
    m = m.to(tl.int64)
    begin = tl.program_id(1)
    y = tl.zeros([BN, BM], tl.float32)
    gated = tl.zeros([BN, BM], tl.float32)
    for part in range(begin, begin + 1 if SPLIT else PARTS):
        more, also = _part(
            x, w, gate, row, m // k * x_stride, valid, part * span,
            tl.minimum(part * span + span, stop), K, padded, gate_padded, FORM, GATE, BM, BN, BK,
        )  # fmt: skip
        y += more
        gated += also
    at = m[None, :] * N + rows[:, None]
    seen = valid[None, :] & (rows < N)[:, None]
    if SPLIT:
        tl.store(out + begin.to(tl.int64) * n * N + at, y, seen)
    else:
        y = _biased(y, w, bias, row[:, None], FORM)
        if gate is not None:
            y *= _activated(_biased(gated, gate, gate_bias, row[:, None], GATE), ACTIVATION)
        else:
            y = _activated(y, ACTIVATION)
        _store(out, y, residual, at, seen, scale)


@triton.jit
def _store(out, y, residual, at, seen, scale):
    y *= scale
    if residual is not None:
        y += tl.load(residual + at, seen, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), seen)


@triton.jit
def _finish(
    out, parts, w, bias, residual, N, scale,
    FORM: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The sum of parts [PARTS, n, N], in order, and what follows it."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    seen = row < N
    at = tl.program_id(1).to(tl.int64) * N + row
    y = tl.zeros([BN], tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(parts + at + (part * tl.num_programs(1)).to(tl.int64) * N, seen, other=0)
    y = _activated(_biased(y, w, bias, tl.minimum(row, N - 1), FORM), ACTIVATION)
    _store(out, y, residual, at, seen, scale)


class Tile(NamedTuple):
    """Of how many rows of x, rows of weights, columns; by how many warps, loaded how far ahead."""

    x: int
    rows: int
    columns: int
    warps: int
    stages: int


class Argument(NamedTuple):
    """A weight as kernels take it. form: (low bits, high bits, middle, groups' sizes, unit)."""

    tensors: tuple[Tensor | None, ...]
    padded: int
    form: tuple[int, ...]


NONE = Argument((), 0, (0,))
EXACT_FEW = Tile(64, 64, 128, 4, 3)
EXACT_MANY = Tile(64, 128, 64, 8, 3)


def _argument(w: Weight) -> Argument:
    if isinstance(w, Plain):
        return Argument((w.values, None), w.cols, (0,))
    if isinstance(w, Float8):
        return Argument((w.values, w.factors), w.cols, (0,))
    minimum = w.minimum or Scales(w.scale.base, None, 0, 0)
    scales = (w.scale.base, w.scale.part, minimum.base, minimum.part)
    parts = [(s.base_group, s.group if s.part is not None else 0) for s in (w.scale, minimum)]
    groups = [group for pair in parts for group in pair]
    unit = min(32, *(group for group in groups if group))
    form = (w.low_bits, w.high_bits if w.high is not None else 0, w.middle, *groups, unit)
    return Argument((w.low, w.high, *scales), w.padded, form)


def _parts(rows: int, cols: int) -> tuple[int, int]:
    """In how many parts K is added up, and how many columns one has: by the weight alone."""
    parts = min(-(-PARTED // -(-rows // 64)), LONGEST)
    span = -(-max(-(-cols // parts), 512) // 256) * 256
    return -(-cols // span), span


def linear(  # noqa: PLR0913
    x: Tensor,
    w: Weight,
    *,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    scale: float = 1.0,
    residual: Tensor | None = None,
    exact: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `gpu/linear.py`."""
    n, rows = len(x), w.rows
    out = x.new_empty((n, rows), dtype=dtype or x.dtype)
    if n == 0:
        return out
    weight = _argument(w)
    parts, span = _parts(rows, w.cols)
    tile = EXACT_FEW if n <= 64 else EXACT_MANY
    split = parts > 1 and n <= 64
    sums = x.new_empty((parts, n, rows), dtype=torch.float32) if split else out
    grid = (-(-n // tile.x) * -(-rows // tile.rows), parts if split else 1)
    _product[grid](
        sums, x, weight.tensors, None, bias, None, residual, None,
        n, rows, w.cols, weight.padded, 0, x.stride(0), scale, span, 1,
        weight.form, (0,), activation, parts, split, tile.x, tile.rows, tile.columns,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        _finish[(-(-rows // 256), n)](
            out, sums, weight.tensors, bias, residual, rows, scale,
            weight.form, activation, parts, 256, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out
