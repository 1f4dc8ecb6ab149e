"""Norms and rotary embeddings as Triton kernels: what is computed of a row is one program's."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _normalize(
    out, x, weight, bias, width, x_stride, eps,
    GROUP: tl.constexpr, REPEATED: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of a row. REPEATED: weight and bias are the same for every group."""
    k = tl.arange(0, BLOCK)
    seen = k < GROUP
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUP
    y = tl.load(x + row * x_stride + first + k, seen, other=0).to(tl.float32)
    if CENTRED:
        y = tl.where(seen, y - tl.sum(y) / GROUP, 0)
    y = y / tl.sqrt_rn(tl.sum(y * y) / GROUP + eps)
    at = k if REPEATED else first + k
    y *= tl.load(weight + at, seen, other=0)
    if bias is not None:
        y += tl.load(bias + at, seen, other=0)
    tl.store(out + row * width + first + k, y.to(out.dtype.element_ty), seen)


@triton.jit
def _rotate(
    out, x, angles, heads, x_stride, SIZE: tl.constexpr, DIMS: tl.constexpr,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some heads of a row. Of every pair, the first is a cos - b sin, the second b cos + a sin."""
    HALF: tl.constexpr = DIMS // 2
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    turned = k < DIMS
    if INTERLEAVED:
        pair, second, partner = k // 2, k % 2 == 1, k ^ 1
    else:
        second = k >= HALF
        pair, partner = k % HALF, tl.where(second, k - HALF, k + HALF)
    cos = tl.load(angles + row * DIMS + pair, turned, other=1)[None, :]
    sin = tl.load(angles + row * DIMS + HALF + pair, turned, other=0)
    sin = tl.where(second, sin, -sin)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    seen = (head < heads) & (k < SIZE)[None, :]
    x += row * x_stride + head * SIZE
    own = tl.load(x + k[None, :], seen, other=0).to(tl.float32)
    other = tl.load(x + partner[None, :], seen & turned[None, :], other=0).to(tl.float32)
    y = (own * cos + other * sin).to(out.dtype.element_ty)
    tl.store(out + (row * heads + head) * SIZE + k[None, :], y, seen)


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: Literal["rms", "layer"], eps: float,
    group: int,
) -> Tensor:  # fmt: skip
    """The norm of every `group` columns, times weight, plus bias; both of a group or of a row."""
    n, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((n, width), dtype=x.dtype, device=x.device)
    if n:
        block = triton.next_power_of_2(group)
        _normalize[(n, width // group)](
            out, x, weight, bias, width, x.stride(0), eps, group, weight.numel() == group,
            kind == "layer", block, num_warps=min(max(block // 512, 1), 16),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def rotate(x: Tensor, angles: Tensor, heads: int, head_dim: int, interleaved: bool) -> Tensor:
    """The first columns of every head turned by angles: [n, cosines and then sines]."""
    n = len(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((n, heads * head_dim), dtype=x.dtype, device=x.device)
    if n:
        block = triton.next_power_of_2(head_dim)
        some = min(triton.next_power_of_2(heads), max(1, 1024 // block))
        _rotate[(n, -(-heads // some))](
            out, x, angles, heads, x.stride(0), head_dim, angles.shape[1], interleaved, some, block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
