"""Layers of a transformer as ops: what decoders, encoders and towers are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from squall import program as p
from squall.roles import ATTENTION, HAS_MIDDLE_NORM, HAS_POST_NORM, HAS_PRE_NORM, Shapes
from squall.spec import Activation, Attention, Layer, Mlp, Moe, Norm, Rope


@dataclass(frozen=True, slots=True)
class Reach:
    """What the rows of an attention see: where spans come from, and its cache, or its memory.

    read: what keys and values are made of, of the rows themselves; by default of these alone.
    relative, buckets: see `program.Attend`.
    """

    spans: p.Index
    cache: int | None = None
    read: Callable[[p.Value], p.Value] = lambda value: value
    relative: p.Vector | None = None
    buckets: tuple[int, ...] = ()


@dataclass
class Blocks:
    """Makes ops with the weights of `names`, whose roles have `shapes`.

    rotary: where a row is for its rotary embedding. context: positions that there are.
    prefix: what roles begin with in `names`.
    """

    names: p.Names
    shapes: Shapes
    rotary: p.Index
    context: int = 1
    residual_scale: float = 1.0
    builder: p.Builder = field(default_factory=p.Builder)
    angles: dict[tuple[tuple[float, ...], float, tuple[int, ...]], p.Value] = field(
        default_factory=dict
    )
    prefix: str = ""

    def layer(
        self,
        x: p.Value,
        name: str,
        layer: Layer,
        reach: Reach,
        chosen: Callable[[p.Value], p.Value] = lambda value: value,
    ) -> p.Value:
        """One block; see `spec.Layer` for the wirings. chosen: rows that go on after attention."""
        recalls, norm = layer.attention.recalls, layer.norm
        first, second = f"{name}.{ATTENTION[recalls]}", f"{name}.feed_forward"
        post = layer.wiring in HAS_POST_NORM
        scales = [self.residual_scale * gate for gate in layer.gates]
        h = self.norm(x, f"{first}.norm", norm) if layer.wiring in HAS_PRE_NORM else x
        heads, bias = self.attention(h, first, layer.attention, reach), layer.attention.out_bias
        heads, x = chosen(heads), chosen(x)
        h = chosen(h) if layer.wiring == "parallel" else h
        if layer.wiring == "sum":
            sums, (one, two) = f"{name}.sum", scales
            x = self.linear(heads, f"{first}.out", sums, bias=bias, residual=x, scale=one)
            x = self.norm(x, f"{first}.post_norm", norm, out=first)
            x = self.feed_forward(x, second, second, layer.feed_forward, residual=x, scale=two)
            return self.norm(x, f"{second}.post_norm", norm, out=name)
        if post:
            out = self.linear(heads, f"{first}.out", f"{first}.projected", bias=bias)
            x = self.add_normed(x, out, first, norm, first, scales[0])
        else:
            x = self.linear(heads, f"{first}.out", first, bias=bias, residual=x, scale=scales[0])
        if layer.wiring != "parallel":  # whose branches share h
            h = self.norm(x, f"{second}.norm", norm) if layer.wiring in HAS_MIDDLE_NORM else x
        if post:
            out = self.feed_forward(h, second, second, layer.feed_forward)
            return self.add_normed(x, out, second, norm, name, scales[1])
        last = f"{second}.out" if recalls else name
        y = self.feed_forward(h, second, last, layer.feed_forward, residual=x, scale=scales[1])
        if not recalls:
            return y
        told = p.Index("told" if y.rows == "tokens" else f"told.{y.rows}", y.rows)
        return self.builder.emit(p.Overlay(self.builder.value(name, y.width, y.rows), x, y, told))

    def attention(self, h: p.Value, name: str, a: Attention, reach: Reach) -> p.Value:
        sizes = a.heads, a.kv_heads, a.head_dim
        if a.recalls:
            assert reach.cache is not None
            (q,) = self.heads(name, a, q=h)
            out = self.builder.value(f"{name}.out", q.width, h.rows)
            return self.builder.emit(p.Recall(out, q, reach.spans, reach.cache, *sizes, a.scale))
        read = reach.read(h)
        q, k, v = self.heads(name, a, q=h, k=read, v=read)
        out = self.builder.value(f"{name}.out", q.width, h.rows)
        how = (reach.cache, *sizes, a.scale, a.window, a.softcap, reach.relative, reach.buckets)
        return self.builder.emit(p.Attend(out, q, k, v, reach.spans, *how))

    def heads(self, name: str, a: Attention, **of: p.Value) -> list[p.Value]:
        """Of rows queries (q), keys (k) and values (v), in this order, or some of them."""
        made = {
            part: self.linear(x, f"{name}.{part}", f"{name}.{part}", bias=a.qkv_bias)
            for part, x in of.items()
        }
        turned = [part for part in made if part != "v"]
        if a.qk_norm is not None:
            whole = a.qk_norm_scope == "row"
            for part in turned:
                group = made[part].width if whole else a.head_dim
                made[part] = self.norm(made[part], f"{name}.{part}_norm", a.qk_norm, group)
        if a.rope is not None:
            for part in turned:
                heads = made[part].width // a.head_dim
                made[part] = self.rotate(made[part], f"{name}.{part}_rotated", a.rope, heads)
        return list(made.values())

    def rotate(self, x: p.Value, name: str, rope: Rope, heads: int) -> p.Value:
        key = (*rope.frequencies(self.context), rope.axes)
        if key not in self.angles:
            suffix = f".{len(self.angles)}" if self.angles else ""
            out = self.builder.value(f"angles{suffix}", rope.dims, x.rows)
            self.angles[key] = self.builder.emit(p.RopeAngles(out, self.rotary, *key))
        out = self.builder.value(name, x.width, x.rows)
        dims = x.width // heads
        return self.builder.emit(p.Rotate(out, x, self.angles[key], heads, dims, rope.interleaved))

    def feed_forward(
        self,
        h: p.Value,
        name: str,
        out: str,
        f: Mlp | Moe,
        *,
        residual: p.Value | None = None,
        scale: float = 1.0,
    ) -> p.Value:
        match f:
            case Moe():
                return self.experts(h, name, out, f, residual=residual, scale=scale)
            case Mlp(gated=True):
                inner = self.gated(h, name, f)
            case Mlp(activation=activation):
                up = f"{name}.up"
                inner = self.linear(h, up, up, bias=f.bias, activation=activation)
        down = f"{name}.down"
        return self.linear(inner, down, out, bias=f.bias, residual=residual, scale=scale)

    def gated(self, h: p.Value, name: str, f: Mlp) -> p.Value:
        gate, up = f"{name}.gate", f"{name}.up"
        out = self.builder.value(up, f.width, h.rows)
        g_bias, up_bias = (self.vector(f"{r}.bias") if f.bias else None for r in (gate, up))
        weights = self.matrix(gate), self.matrix(up)
        return self.builder.emit(p.GatedLinear(out, h, *weights, f.activation, g_bias, up_bias))

    def experts(
        self, h: p.Value, name: str, out: str, f: Moe, *, residual: p.Value | None, scale: float
    ) -> p.Value:
        value = self.builder.value(out, h.width, h.rows)
        parts = ("router", "experts.gate", "experts.up", "experts.down")
        router, gate, up, down = (self.matrix(f"{name}.{part}") for part in parts)
        how = (f.top_k, f.activation, f.normalize, f.jitter, scale, residual)
        return self.builder.emit(p.MixtureOfExperts(value, h, router, gate, up, down, *how))

    def linear(  # noqa: PLR0913
        self,
        x: p.Value,
        role: str,
        out: str,
        *,
        bias: bool,
        activation: Activation | None = None,
        residual: p.Value | None = None,
        scale: float = 1.0,
        taps: p.Index | None = None,
    ) -> p.Value:
        weight = self.matrix(role)
        b = self.vector(f"{role}.bias") if bias else None
        value = self.builder.value(out, weight.rows, (taps or x).rows)
        how = (b, activation, scale, residual, None, taps)
        return self.builder.emit(p.Linear(value, x, weight, *how))

    def norm(
        self, x: p.Value, role: str, norm: Norm, group: int | None = None, out: str = ""
    ) -> p.Value:
        weight = self.vector(f"{role}.weight", offset=1.0 if norm.unit_offset else 0.0)
        bias = self.vector(f"{role}.bias") if norm.bias else None
        value = self.builder.value(out or role, x.width, x.rows)
        run = x.width if group is None else group
        return self.builder.emit(p.Normalize(value, x, weight, bias, norm.kind, norm.eps, run))

    def add_normed(
        self, x: p.Value, y: p.Value, role: str, norm: Norm, name: str, scale: float
    ) -> p.Value:
        normed = self.norm(y, f"{role}.post_norm", norm)
        out = self.builder.value(name, x.width, x.rows)
        return self.builder.emit(p.Add(out, x, normed, scale))

    def matrix(self, role: str) -> p.Matrix:
        shape = self.shapes[f"{role}.weight"]
        if len(shape) == 4:  # a convolution
            shape = shape[0], math.prod(shape[1:])
        *experts, rows, cols = shape
        own = self.prefix + role
        return p.Matrix(self.names[f"{own}.weight"], rows, cols, math.prod(experts), own)

    def vector(self, role: str, *, offset: float = 0.0) -> p.Vector:
        own = self.prefix + role
        return p.Vector(self.names[own], self.shapes[role][0], offset, own)
