"""Products with weights on a device: Triton's kernels where they run, else PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from squall.gpu import uses_triton
from squall.gpu.matrices import Float8, Plain, Weight, dense_runs, lookup, one
from squall.spec import Activation

# A BLAS chooses by the shape of a product, and on a CPU by its threads too, how it adds up. So
# exact products have one shape: tiles of rows, the last one filled with zeros. On a CPU they are
# also so short that threads do not share a sum (MKL shares sums of 128), and are added in order.
_TILE = 16
_SUM = 64
_LARGEST = 448  # of float8
_GATHERED = 1 << 24  # values of rows side by side
_MANY = 512  # rows from which on it costs little to write a weight as floats first

_Elementwise = Callable[[Tensor], Tensor]


def _logistic(x: Tensor, factor: float = 1.0) -> Tensor:
    return x / (1 + torch.exp(-factor * x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


# Of operations that PyTorch computes alike wherever in a tensor an element stands, on CPUs too.
_EXACT: Mapping[Activation, _Elementwise] = {
    "silu": _logistic,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: _logistic(x, 1.702),
    "relu": F.relu,
}
_FAST: Mapping[Activation, _Elementwise] = {
    **_EXACT,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activated(x: Tensor, activation: Activation | None, *, exact: bool) -> Tensor:
    """An activation of every element, as the products here have it."""
    return x if activation is None else (_EXACT if exact else _FAST)[activation](x)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """scale * activation(x @ weight.T + bias), or with a gate
    scale * activation(x @ gate.T + gate_bias) * (x @ weight.T + bias).

    Biases of experts are one after another.
    """

    weight: Weight
    bias: Tensor | None = None
    activation: Activation | None = None
    gate: Weight | None = None
    gate_bias: Tensor | None = None
    scale: float = 1.0


def linear(
    x: Tensor,  # [rows, cols of the weight]
    product: Product,
    *,
    residual: Tensor | None = None,
    exact: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + product, in the type of x, or another."""
    w, bias, activation = product.weight, product.bias, product.activation
    if _by_triton(x, exact, w, product.gate or w):
        from squall.gpu import triton_linear

        return triton_linear.linear(x, product, residual=residual, exact=exact, dtype=dtype)
    dtype = dtype or x.dtype
    if product.gate is not None:
        wide = torch.float32 if exact else x.dtype
        first, y = (
            linear(x, part, exact=exact, dtype=wide)
            for part in (Product(product.gate, product.gate_bias), Product(w, bias))
        )
        y = activated(first, activation, exact=exact) * y
    else:
        added = residual if bias is None else bias.to(dtype)
        simple = activation is None and product.scale == 1.0 and (bias is None or residual is None)
        if simple and added is not None and isinstance(w, Plain) and not exact and dtype == x.dtype:
            return torch.addmm(added, x, w.values[0].to(dtype).T)
        y = _product(x, w, exact=exact, dtype=dtype)
        y = y if bias is None else y.float() + bias
        y = y if activation is None else activated(y.float(), activation, exact=exact)
    y = y if product.scale == 1.0 else y * product.scale
    return (y if residual is None else residual + y).to(dtype)


def convolved(
    x: Tensor, product: Product, taps: Tensor, *, residual: Tensor | None, exact: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A product of rows of x side by side, [taps, rows], negative: zeros; some rows at a time."""
    out = x.new_empty(taps.shape[1], product.weight.rows, dtype=dtype)
    padded = F.pad(x, (0, 0, 0, 1))
    taps = torch.where(taps < 0, len(x), taps).T
    step = max(_GATHERED // product.weight.cols // _TILE, 1) * _TILE
    for start in range(0, len(taps), step):
        some, own = taps[start : start + step], slice(start, start + step)
        beside = padded.index_select(0, some.reshape(-1)).view(len(some), -1)
        more = None if residual is None else residual[own]
        out[own] = linear(beside, product, residual=more, exact=exact, dtype=dtype)
    return out


def embed(ids: Tensor, table: Weight, *, scale: float, dtype: torch.dtype) -> Tensor:
    """Rows of a table, times the scale."""
    if uses_triton(ids):
        from squall.gpu import triton_linear

        return triton_linear.embed(ids, table, scale=scale, dtype=dtype)
    return (lookup(table, ids) * scale).to(dtype)


def experts(
    x: Tensor,  # [rows, cols]
    chosen: Tensor,  # int32 [rows, k]
    shares: Tensor,  # float32 [rows, k]
    inner: Product,
    down: Product,
    *,
    exact: bool,
) -> Tensor:
    """The sum of shares * down(inner(x)) over the chosen, in order; float32."""
    if uses_triton(x):
        from squall.gpu import triton_linear

        return triton_linear.experts(x, chosen, shares, inner, down, exact=exact)

    return expert_by_expert(x, (chosen, shares), inner, down, exact, lambda *_: None)


Add = Callable[[Tensor, Tensor, str, int, Tensor], None]
"""Adds to y, of rows of x, what they have beside the gate, the up or the down of an expert; which
rows of all those are."""


def expert_by_expert(
    x: Tensor, routed: tuple[Tensor, Tensor], inner: Product, down: Product, exact: bool, add: Add
) -> Tensor:
    """The same, with what is added to products. The host asks which experts there are."""
    chosen, shares = routed
    found = x.new_empty(*chosen.shape, down.weight.rows, dtype=torch.float32)
    asked = chosen.cpu().numpy()
    for expert in np.unique(asked).tolist():
        own, places = torch.as_tensor(np.stack(np.nonzero(asked == expert)), device=x.device)
        part = partial(_part, expert, own, exact, add)
        y = part("up", x[own], inner.weight, inner.bias)
        if inner.gate is None:
            y = activated(y, inner.activation, exact=exact)
        else:
            gate = part("gate", x[own], inner.gate, inner.gate_bias)
            y = activated(gate, inner.activation, exact=exact) * y
        found[own, places] = part("down", y.to(x.dtype), down.weight, down.bias)
    total = x.new_zeros(len(x), down.weight.rows, dtype=torch.float32)
    for k in range(chosen.shape[1]):
        total += shares[:, k, None] * found[:, k]
    return total


def _part(  # noqa: PLR0913
    expert: int, own: Tensor, exact: bool, add: Add, name: str, x: Tensor, w: Weight,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    y = linear(x, Product(one(w, expert)), exact=exact, dtype=torch.float32)
    add(y, x, name, expert, own)
    return y if bias is None else y + bias.view(w.experts, -1)[expert]


def _by_triton(x: Tensor, exact: bool, *weights: Weight) -> bool:
    """Whether a BLAS is not as good."""
    many = len(x) >= _MANY
    return uses_triton(x) and (
        exact
        or len(x) == 1  # which reads each weight once, and has no launch for what follows
        or not all(many or isinstance(w, Plain) or _fits(x, w) for w in weights)
    )


def _fits(x: Tensor, w: Weight) -> bool:
    """Whether the device multiplies its float8 by activations in float8, and it is worth it."""
    return (
        isinstance(w, Float8)
        and len(x) > _TILE
        and w.rows % 16 == w.cols % 16 == 0
        and x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
    )


def _product(x: Tensor, w: Weight, *, exact: bool, dtype: torch.dtype | None = None) -> Tensor:
    """x @ w.T, in the type of x or in `dtype`."""
    if not exact and _fits(x, w):
        assert isinstance(w, Float8)
        scales = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
        codes = (x / scales).to(torch.float8_e4m3fn)
        given = w.values[0].T, scales, w.factors
        return torch._scaled_mm(codes, *given, out_dtype=torch.bfloat16)
    if isinstance(w, Plain):
        values = w.values[0].to(x.dtype)
        if dtype == torch.float32 != x.dtype and x.is_cuda and not exact:
            return torch.mm(x, values.T, out_dtype=dtype)
        return _times(x, values, exact)
    if uses_triton(x) and not exact:
        from squall.gpu import triton_linear

        return _times(x, triton_linear.dense(w, 0, x.dtype), exact)
    parts = [_times(x, rows.to(x.dtype), exact) for rows in dense_runs(w)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _times(x: Tensor, w: Tensor, exact: bool) -> Tensor:
    if not exact or not len(x):
        return F.linear(x, w)
    rows, cols = x.shape
    step = _SUM if x.device.type == "cpu" else cols
    tiles = F.pad(x, (0, 0, 0, -rows % _TILE)).view(-1, _TILE, cols)
    return torch.cat([_sum(tile, w, step) for tile in tiles])[:rows]


def _sum(x: Tensor, w: Tensor, step: int) -> Tensor:
    total = x[:, :step] @ w[:, :step].T
    for start in range(step, x.shape[1], step):
        part = slice(start, start + step)
        total += x[:, part] @ w[:, part].T
    return total
