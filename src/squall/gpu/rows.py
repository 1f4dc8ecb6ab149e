"""Sums, norms and rotations of rows: Triton's kernels where they run, else PyTorch.

A row's bytes do not depend on the others: sums are trees of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from squall import program as p
from squall.gpu import uses_triton

_VALUES = 1 << 24


def total(x: Tensor) -> Tensor:
    """Sums of the last axis, [..., 1]: halves are added until one is left."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    kind: Literal["rms", "layer"], eps: float, group: int,
) -> Tensor:  # fmt: skip
    """See `program.Normalize`; x: [rows, width]."""
    if uses_triton(x):
        from squall.gpu import triton_rows

        return triton_rows.normalize(x, weight, bias, kind, eps, group)
    y = x.float().view(len(x), x.shape[1] // group, group)
    if kind == "layer":
        y = y - total(y) / group
    y = y / torch.sqrt(total(y * y) / group + eps) * weight.view(-1, group)
    y = y if bias is None else y + bias.view(-1, group)
    return y.view(x.shape).to(x.dtype)


def group_normalize(
    op: p.GroupNormalize, x: Tensor, weight: Tensor, bias: Tensor,
    activated: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """See `program.GroupNormalize`; x: [rows, width]. Few rows at a time are float32."""
    shape, count = (-1, op.groups, op.x.width // op.groups), len(x) * op.x.width // op.groups
    parts = [part.view(shape) for part in x.split(max(_VALUES // op.x.width, 1))]

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        sums = [total(total(of(part.float()))[..., 0].T) for part in parts]
        return total(torch.cat(sums, 1)) / count

    centre = mean(lambda y: y)
    factor = weight.view(op.groups, -1) / torch.sqrt(mean(lambda y: (y - centre) ** 2) + op.eps)
    shift = bias.view(op.groups, -1)
    norms = ((part.float() - centre) * factor + shift for part in parts)
    return torch.cat([activated(norm).to(x.dtype) for norm in norms]).view(x.shape)


def rotate(x: Tensor, angles: Tensor, heads: int, head_dim: int, interleaved: bool) -> Tensor:
    """See `program.Rotate`; x: [rows, heads * head_dim], angles: float32 [rows, width]."""
    if uses_triton(x):
        from squall.gpu import triton_rows

        return triton_rows.rotate(x, angles, heads, head_dim, interleaved)
    rows, half = len(x), angles.shape[1] // 2
    y = x.float().view(rows, heads, head_dim)
    turned, rest = y[..., : 2 * half], y[..., 2 * half :]
    shape, axis = ((half, 2), -1) if interleaved else ((2, half), -2)
    first, second = turned.reshape(rows, heads, *shape).unbind(axis)
    cos, sin = angles[:, None].split(half, -1)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, axis).view(rows, heads, 2 * half)
    return torch.cat((turned, rest), -1).view(x.shape).to(x.dtype)
