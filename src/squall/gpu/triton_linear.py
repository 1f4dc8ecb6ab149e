"""Products with weights of `gpu/matrices.py`, as Triton kernels.

One kernel multiplies tiles in tensor cores: weights are the first operand, [BN, BK], unpacked where
they are used, rows of x the second, [BK, BM]. So few rows of x waste little, and on Hopper a tile
of 64 weights' rows is one warpgroup's. With `exact`, BM is always the same, and so is the
instruction (of BM columns): a row of x is one column of it, wherever it stands. K is cut into
parts by the weight's shape alone, each added up from its begin, and the parts in order, whether by
one program or by many and a second pass. What that costs: up to 64 rows, arithmetic that hides
behind memory for floats, hardly for 4 bits; of a long prompt, a weight is read and unpacked once
for every 64 rows, instead of 128 or, by `dense`, once.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from squall.gpu.linear import Product
from squall.gpu.matrices import Float8, Packed, Plain, Weight

PARTED = 256  # programs that a product of few rows should have at least
LONGEST = 8  # parts of K at most
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PERMUTE = tl.constexpr([f"prmt.b32 $0, $1, $2, 0x744{t};" for t in range(4)])


@triton.jit
def _groups(
    values, row, start, padded,
    SIZE: tl.constexpr, U: tl.constexpr, BK: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Values of groups of SIZE columns, for every U columns from `start` on or for all BK."""
    STEP: tl.constexpr = BK if SIZE >= BK else U
    column = (start + tl.expand_dims(tl.arange(0, BK // STEP), 1 - AXIS) * STEP).to(tl.uint32)
    at = tl.expand_dims(row, AXIS) * (padded // SIZE) + column // SIZE
    return tl.load(values + at, column < padded, other=0).to(tl.float32)


@triton.jit
def _scales(
    base, part, row, start, padded,
    BASE: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr, BK: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    scale = _groups(base, row, start, padded, BASE, U, BK, AXIS)
    if GROUP:
        scale = scale * _groups(part, row, start, padded, GROUP, U, BK, AXIS)
    return scale[:, :, None]


@triton.jit
def _plane(
    plane, row, start, padded,
    BITS: tl.constexpr, U: tl.constexpr, BK: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Bits of codes, four codes a word."""
    RUN: tl.constexpr = 256 // BITS
    unit = tl.expand_dims(tl.arange(0, BK // U), 1 - AXIS)[:, :, None]
    column = (start + unit * U).to(tl.uint32)
    word = column // U % (32 // U) * (U // 4) + tl.arange(0, U // 4)[None, None, :]
    row = tl.expand_dims(row, AXIS)[:, :, None] * (padded // RUN * 8)
    words = plane.to(tl.pointer_type(tl.uint32)) + row + column // RUN * 8 + word
    words = tl.load(words, column < padded, other=0)
    return (words >> (column % RUN // 32 * BITS)) & ((1 << BITS) - 1) * 0x01010101


@triton.jit
def _words(w, row, start, padded, FORM: tl.constexpr, BK: tl.constexpr, AXIS: tl.constexpr):
    """Codes of columns from `start` on, four a word: [BN, BK // U, U // 4], or AXIS 0 first."""
    words = _plane(w[0], row, start, padded, FORM[0], FORM[7], BK, AXIS)
    if FORM[1]:
        words |= _plane(w[1], row, start, padded, FORM[1], FORM[7], BK, AXIS) << FORM[0]
    return words


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
    """Weights of columns from `start` on, in float32, [BN, BK // U, U // 4, 2, 2]."""
    words = _words(w, row, start, padded, FORM, BK, 1)
    scale = _scales(w[2], w[3], row, start, padded, FORM[3], FORM[4], FORM[7], BK, 1)
    w0 = _number(words, padded, 0, FORM[2])
    w1 = _number(words, padded, 1, FORM[2])
    w2 = _number(words, padded, 2, FORM[2])
    w3 = _number(words, padded, 3, FORM[2])
    if FORM[5]:
        least = -_scales(w[4], w[5], row, start, padded, FORM[5], FORM[6], FORM[7], BK, 1)
        w0, w1 = tl.fma(scale, w0, least), tl.fma(scale, w1, least)
        w2, w3 = tl.fma(scale, w2, least), tl.fma(scale, w3, least)
    else:
        w0, w1, w2, w3 = scale * w0, scale * w1, scale * w2, scale * w3
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _rounded(pairs, TYPE: tl.constexpr):
    """`to(TYPE)`, of neighbours at once."""
    if INTERPRETED or tl.float32 == TYPE:
        rounded = pairs.to(TYPE)
    elif tl.bfloat16 == TYPE:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [pairs], tl.bfloat16, is_pure=True, pack=2
        )
    else:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [pairs], tl.float16, is_pure=True, pack=2
        )
    return rounded


@triton.jit
def _float8(codes):
    """e4m3fn as float16, whose exponents are 8 less: chips before Hopper have no such type."""
    codes = codes.to(tl.uint16)
    values = ((codes & 128) << 8 | (codes & 127) << 7).to(tl.float16, bitcast=True) * 256
    return tl.where((codes & 127) == 127, float("nan"), values)


@triton.jit
def _tile(w, row, start, K, padded, FORM: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr):
    """Weights [BN, BK] of columns from `start` on."""
    if FORM[0] == 0:
        k = start + tl.arange(0, BK)
        tile = tl.load(w[0] + row[:, None] * K + k[None, :], k[None, :] < K, other=0)
        tile = _float8(tile).to(TYPE) if FORM[1] else tile.to(TYPE)
    else:
        four = _rounded(_unpacked(w, row, start, padded, FORM, BK), TYPE)
        tile = tl.reshape(four, [row.shape[0], BK])
    return tile


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = y / (1 + tl.exp(-tl.maximum(y, -80)))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y - y / (tl.exp(tl.minimum(2 * z, 80)) + 1)
    elif ACTIVATION == "quick_gelu":
        y = y / (1 + tl.exp(-tl.maximum(1.702 * y, -80)))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0)
    return y


@triton.jit
def _biased(y, w, bias, row, FORM: tl.constexpr):
    """With the factors of rows, if there are, and the bias."""
    if FORM[0] == 0 and FORM[1]:
        y *= tl.load(w[1] + row)
    if bias is not None:
        y += tl.load(bias + row)
    return y


@triton.jit
def _gated(
    y, gated, w, gate, bias, gate_bias, row,
    FORM: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    y = _biased(y, w, bias, row, FORM)
    if GATE[0] >= 0:
        y *= _activated(_biased(gated, gate, gate_bias, row, GATE), ACTIVATION)
    else:
        y = _activated(y, ACTIVATION)
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
        if GATE[0] >= 0:
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
    y, gated = _part(
        x, w, gate, row, m // k * x_stride, valid, begin * span,
        tl.minimum(begin * span + span, stop), K, padded, gate_padded, FORM, GATE, BM, BN, BK,
    )  # fmt: skip
    if PARTS > 1 and not SPLIT:
        for part in range(1, PARTS):
            more, _ = _part(
                x, w, gate, row, m // k * x_stride, valid, part * span,
                tl.minimum(part * span + span, stop), K, padded, gate_padded, FORM, GATE,
                BM, BN, BK,
            )  # fmt: skip
            y += more
    at = m[None, :] * N + rows[:, None]
    seen = valid[None, :] & (rows < N)[:, None]
    if SPLIT:
        tl.store(out + begin.to(tl.int64) * n * N + at, y, seen)
    else:
        row = row[:, None]
        y = _gated(y, gated, w, gate, bias, gate_bias, row, FORM, GATE, ACTIVATION)
        _store(out, y, residual, at, seen, scale)


@triton.jit
def _store(out, y, residual, at, seen, scale):
    y *= scale
    if residual is not None:
        y += tl.load(residual + at, seen, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), seen)


@triton.jit
def _sum(
    out, parts, shares, w, bias, residual, N, row_step, part_step, scale,
    FORM: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of parts of rows, in order, each times its share if there are shares, and what follows."""
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    seen = row < N
    m = tl.program_id(0).to(tl.int64)
    parts += m * row_step + row
    y = tl.zeros([BN], tl.float32)
    for part in tl.static_range(PARTS):
        more = tl.load(parts + tl.full([], part, tl.int64) * part_step, seen, other=0)
        if shares is not None:
            more *= tl.load(shares + m * PARTS + part)
        y = y + more if part else more
    y = _activated(_biased(y, w, bias, tl.minimum(row, N - 1), FORM), ACTIVATION)
    _store(out, y, residual, m * N + row, seen, scale)


@triton.jit
def _dots(x, w, row, K, padded, FORM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Products of one row of x, [BN]."""
    if FORM[0] == 0:
        sums = tl.zeros([BN, BK], tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            values = tl.load(x + k, k < K, other=0).to(tl.float32)[None, :]
            sums += _tile(w, row, start, K, padded, FORM, BK, tl.float32) * values
        y = tl.sum(sums, 1)
    else:
        U: tl.constexpr = FORM[7]
        C: tl.constexpr = BK // U
        sums = tl.zeros([C, BN, U // 4], tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, C)[:, None, None] * U + tl.arange(0, U // 4)[None, :, None] * 4
            k += tl.arange(0, 4)[None, None, :]
            values = tl.load(x + k, k < K, other=0).to(tl.float32)
            even, odd = tl.split(tl.reshape(values, [C, U // 4, 2, 2]))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            words = _words(w, row, start, padded, FORM, BK, 0)
            part = _number(words, padded, 0, FORM[2]) * x0[:, None, :]
            part += _number(words, padded, 1, FORM[2]) * x1[:, None, :]
            part += _number(words, padded, 2, FORM[2]) * x2[:, None, :]
            part += _number(words, padded, 3, FORM[2]) * x3[:, None, :]
            sums += part * _scales(w[2], w[3], row, start, padded, FORM[3], FORM[4], U, BK, 0)
            if FORM[5]:
                minimum = _scales(w[4], w[5], row, start, padded, FORM[5], FORM[6], U, BK, 0)
                sums -= minimum * ((x0 + x1) + (x2 + x3))[:, None, :]
        y = tl.sum(tl.sum(sums, 2), 0)
    return y


@triton.jit
def _vector(
    out, x, w, gate, bias, gate_bias, residual, chosen, N, K, padded, gate_padded, x_stride, scale,
    k, FORM: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Some of a row of out, from the row of x divided by k; chosen: by which expert each."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    m = tl.program_id(1)
    if chosen is not None:
        row += tl.load(chosen + m).to(tl.int64) * N
    x += (m // k).to(tl.int64) * x_stride
    y = _dots(x, w, row, K, padded, FORM, BN, BK)
    gated = _dots(x, gate, row, K, gate_padded, GATE, BN, BK) if GATE[0] >= 0 else y
    y = _gated(y, gated, w, gate, bias, gate_bias, row, FORM, GATE, ACTIVATION)
    _store(out, y, residual, m.to(tl.int64) * N + rows, rows < N, scale)


@triton.jit
def _rows(out, ids, w, K, padded, scale, FORM: tl.constexpr, BK: tl.constexpr):
    """Rows of a table."""
    row = tl.load(ids + tl.program_id(0)).to(tl.int64) + tl.zeros([1], tl.int64)
    start = tl.program_id(1) * BK
    k = start + tl.arange(0, BK)[None, :]
    y = _biased(_tile(w, row, start, K, padded, FORM, BK, tl.float32), w, None, row[:, None], FORM)
    _store(out, y, None, tl.program_id(0).to(tl.int64) * K + k, k < K, scale)


class Tile(NamedTuple):
    """Of how many rows of x, rows of weights, columns; by how many warps, loaded how far ahead."""

    x: int
    rows: int
    columns: int
    warps: int
    stages: int


FEW, SOME = 16, 64  # rows of x, up to which the first tile is for, and the second
_EXACT, _SOME, _WIDE = Tile(64, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3), Tile(64, 128, 64, 8, 3)
_LOW, _LARGE = Tile(64, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3)
# By whether the device has warpgroups, exactness is asked for, and the weights are packed.
TILES = {
    (True, True, False): (_EXACT, _EXACT, _WIDE),
    (True, True, True): (_SOME, _SOME, Tile(64, 128, 128, 8, 2)),
    (True, False, False): (Tile(16, 64, 128, 4, 4), _EXACT, _LARGE),
    (True, False, True): (Tile(16, 64, 128, 4, 3), _SOME, _LARGE),
    (False, True, False): (_EXACT, _EXACT, _WIDE),
    (False, True, True): (_LOW, _LOW, _LOW),
    (False, False, False): (Tile(16, 64, 128, 4, 3), _EXACT, _WIDE),
    (False, False, True): (Tile(16, 64, 128, 8, 3), Tile(64, 64, 128, 8, 2), _WIDE),
}


class Argument(NamedTuple):
    """A weight as kernels take it.

    form: bits of planes, middle, sizes of groups, of a unit; floats: 0, and whether of 8 bits.
    """

    tensors: tuple[Tensor | None, ...]
    padded: int
    form: tuple[int, ...]


Plan = tuple[Tensor, Tensor, Tensor, Tensor]
"""Rows of out in order of their experts; of every tile the expert, where it begins and ends."""


class Routes(NamedTuple):
    """Which expert each row of out has; its row of x is its own number divided by k.

    chosen: None: there are none to choose. plan: None, if rows are computed one by one.
    """

    chosen: Tensor | None
    k: int
    plan: Plan | None


NO_ROUTES = Routes(None, 1, None)


def _argument(w: Weight | None) -> Argument:
    if w is None:
        return Argument((), 0, (-1,))
    if isinstance(w, Plain):
        return Argument((w.values, None), w.cols, (0, 0))
    if isinstance(w, Float8):
        return Argument((w.values.view(torch.uint8), w.factors), w.cols, (0, 1))
    scales = (w.base, w.part, w.base if w.least is None else w.least, w.less)
    groups = [w.base_group, w.group if w.part is not None else 0]
    groups += [w.base_group if w.least is not None else 0, w.group if w.less is not None else 0]
    form = (w.low_bits, w.high_bits, w.middle, *groups, min(32, w.group))
    return Argument((w.low, w.high, *scales), w.padded, form)


def _parts(rows: int, cols: int) -> tuple[int, int]:
    """In how many parts K is added up, and how many columns one has: by the weight alone."""
    parts = min(-(-PARTED // -(-rows // 64)), LONGEST)
    span = -(-max(-(-cols // parts), 512) // 256) * 256
    return -(-cols // span), span


def linear(
    x: Tensor, product: Product, *, residual: Tensor | None = None, exact: bool,
    dtype: torch.dtype | None = None, routes: Routes = NO_ROUTES,
) -> Tensor:  # fmt: skip
    n = len(x) if routes.chosen is None else routes.chosen.numel()
    out = x.new_empty((n, product.weight.rows), dtype=dtype or x.dtype)
    if n == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    one = len(x) == 1 and not exact if routes.chosen is None else routes.plan is None
    if one:
        _one(out, x, product, residual, routes)
    else:
        _many(out, x, product, residual, routes, exact)
    return out


def _one(out: Tensor, x: Tensor, product: Product, residual: Tensor | None, routes: Routes) -> None:
    w, weight, gate = product.weight, _argument(product.weight), _argument(product.gate)
    rows = 4 if w.rows <= 8192 else 8
    _vector[(-(-w.rows // rows), len(out))](
        out, x, weight.tensors, gate.tensors, product.bias, product.gate_bias, residual,
        routes.chosen, w.rows, w.cols, weight.padded, gate.padded,
        x.stride(0), product.scale, routes.k,
        weight.form, gate.form, product.activation, rows, 1024, num_warps=rows // 2,
    )  # fmt: skip


def _many(
    out: Tensor, x: Tensor, product: Product, residual: Tensor | None, routes: Routes,
    exact: bool,
) -> None:  # fmt: skip
    w, weight, gate = product.weight, _argument(product.weight), _argument(product.gate)
    n, whole = len(out), product.gate is None and routes.chosen is None
    packed = isinstance(w, Packed) or isinstance(product.gate, Packed)
    tile = _tile_of(n, x.device, exact, packed)
    parts, span = _parts(w.rows, w.cols) if whole and (exact or n <= SOME) else (1, w.cols)
    split = parts > 1 and n <= SOME
    plan = routes.plan
    count = -(-n // tile.x) if plan is None else plan[1].numel()
    sums = x.new_empty((parts, n, w.rows), dtype=torch.float32) if split else out
    _product[(count * -(-w.rows // tile.rows), parts if split else 1)](
        sums, x, weight.tensors, gate.tensors, product.bias, product.gate_bias,
        residual, plan, n, w.rows, w.cols, weight.padded, gate.padded, x.stride(0),
        product.scale, span, routes.k, weight.form, gate.form,
        product.activation, parts, split, tile.x, tile.rows, tile.columns,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        _sum[(n, -(-w.rows // 256))](
            out, sums, None, weight.tensors, product.bias, residual, w.rows, w.rows,
            n * w.rows, product.scale, weight.form, product.activation, parts, 256,
            num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip


@cache
def _has_warpgroups(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _tile_of(n: int, device: torch.device, exact: bool, packed: bool) -> Tile:
    few, some, many = TILES[_has_warpgroups(device), exact, packed]
    return few if n <= FEW else some if n <= SOME else many


def _plan(chosen: Tensor, count: int, exact: bool) -> Plan:
    """Made on the device, with as many tiles as there could be: those too many are empty."""
    device, n = chosen.device, chosen.numel()
    if len(chosen) == 1:
        own = torch.arange(n, device=device)
        return own, chosen, own, own + 1
    height = _tile_of(n, device, exact, packed=True).x
    ordered, rows = torch.sort(chosen.flatten(), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=device, dtype=chosen.dtype))
    tiles = (bounds[1:] - bounds[:-1] + height - 1) // height
    last = tiles.cumsum(0)
    tile = torch.arange(min(n, n // height + count), device=device)
    expert = torch.searchsorted(last, tile, right=True).clamp_max(count - 1)
    begin = bounds[expert] + (tile - last[expert] + tiles[expert]) * height
    return rows, expert, begin, torch.minimum(begin + height, bounds[expert + 1])


def embed(ids: Tensor, table: Weight, *, scale: float, dtype: torch.dtype) -> Tensor:
    out = torch.empty((len(ids), table.cols), dtype=dtype, device=ids.device)
    if len(ids):
        weight = _argument(table)
        _rows[(len(ids), -(-table.cols // 1024))](
            out, ids, weight.tensors, table.cols, weight.padded, scale, weight.form, 1024
        )
    return out


def dense(w: Weight, expert: int, dtype: torch.dtype) -> Tensor:
    """An expert's values, [rows, cols]."""
    ids = torch.arange(expert * w.rows, (expert + 1) * w.rows, device=w.device)
    return embed(ids, w, scale=1.0, dtype=dtype)


def experts(
    x: Tensor, chosen: Tensor, shares: Tensor, inner: Product, down: Product, *, exact: bool
) -> Tensor:
    n, k = chosen.shape
    plan = None if n == 1 and not exact else _plan(chosen, inner.weight.experts, exact)
    y = linear(x, inner, exact=exact, routes=Routes(chosen, k, plan))
    routes, width = Routes(chosen, 1, plan), down.weight.rows
    parts = linear(y, down, exact=exact, dtype=torch.float32, routes=routes)
    out = x.new_empty((n, width), dtype=torch.float32)
    if n:
        _sum[(n, -(-width // 256))](
            out, parts, shares, (), None, None, width, k * width, width, 1.0, (-1,),
            None, k, 256, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out
