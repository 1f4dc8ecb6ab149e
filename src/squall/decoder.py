"""Spec -> program: the one decoder implementation, for any model a `spec.Decoder` can describe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from squall.program import (
    Add,
    Attend,
    Builder,
    CacheLayer,
    Embed,
    GatedLinear,
    GatherRows,
    Index,
    Linear,
    Matrix,
    MixtureOfExperts,
    Names,
    Normalize,
    Program,
    RopeAngles,
    Rotate,
    Softcap,
    Value,
    Vector,
)
from squall.roles import HAS_POST_NORM, HAS_PRE_NORM, Shapes, roles
from squall.spec import Activation, Attention, Decoder, Layer, Mlp, Moe, Norm, Rope

TOKENS = Index("tokens")
# Where a row is for its rotary embedding; its place in the cache comes with its sequence.
ROTARY = Index("rotary")
SPANS = Index("spans", axes=2)
OUTPUTS = Index("outputs", rows="outputs")


def compile(decoder: Decoder, names: Names, *, context: int, whole: bool = False) -> Program:
    """The program of `decoder` with the weights of `names`, for up to `context` tokens.

    whole: the last layer is computed for all rows, not only those whose logits are wanted.
    """
    return _Compiler(decoder, names, context, roles(decoder), whole).program()


@dataclass
class _Compiler:
    decoder: Decoder
    names: Names
    context: int
    shapes: Shapes
    whole: bool
    builder: Builder = field(default_factory=Builder)
    angles: dict[tuple[tuple[float, ...], float], Value] = field(default_factory=dict)

    def program(self) -> Program:
        d, b = self.decoder, self.builder
        table = self.matrix("embed")
        x = b.emit(Embed(b.value("embed", d.hidden), TOKENS, table, d.embed_scale))
        for index, layer in enumerate(d.layers):
            x = self.layer(x, f"layers.{index}", index, layer)
        x = self.norm(x, "norm", d.norm)
        x = self.outputs(x) if self.whole else x
        head = replace(table, role="head") if d.tied else self.matrix("head")
        name = "logits" if d.logit_softcap is None else "head"
        out = b.value(name, d.vocab, "outputs")
        bias = self.vector("head.bias") if d.head_bias else None
        logits = b.emit(Linear(out, x, head, bias, scale=d.logit_scale))
        if d.logit_softcap is not None:
            logits = b.emit(Softcap(b.value("logits", d.vocab, "outputs"), logits, d.logit_softcap))
        attentions = [layer.attention for layer in d.layers]
        caches = tuple(CacheLayer(a.kv_heads, a.head_dim) for a in attentions)
        return b.build(logits, caches=caches, context=self.context)

    def layer(self, x: Value, name: str, index: int, layer: Layer) -> Value:
        """One block; see `spec.Layer` for the wirings."""
        first, second, norm = f"{name}.attention", f"{name}.feed_forward", layer.norm
        pre, post = HAS_PRE_NORM[layer.wiring], HAS_POST_NORM[layer.wiring]
        h = self.norm(x, f"{first}.norm", norm) if pre else x
        heads, bias = self.attention(h, first, index, layer.attention), layer.attention.out_bias
        if (
            index == len(self.decoder.layers) - 1 and not self.whole
        ):  # other rows were only for its keys and values
            heads, x = self.outputs(heads), self.outputs(x)
            h = self.outputs(h) if layer.wiring == "parallel" else h
        if post:
            out = self.linear(heads, f"{first}.out", f"{first}.projected", bias=bias)
            x = self.add_normed(x, out, first, norm, first)
        else:
            x = self.linear(heads, f"{first}.out", first, bias=bias, residual=x)
        if layer.wiring != "parallel":  # whose branches share h
            h = self.norm(x, f"{second}.norm", norm) if pre else x
        if post:
            out = self.feed_forward(h, second, second, layer.feed_forward)
            return self.add_normed(x, out, second, norm, name)
        return self.feed_forward(h, second, name, layer.feed_forward, residual=x)

    def outputs(self, x: Value) -> Value:
        value = self.builder.value(f"{x.name}.outputs", x.width, "outputs")
        return self.builder.emit(GatherRows(value, x, OUTPUTS))

    def attention(self, h: Value, name: str, index: int, a: Attention) -> Value:
        q = self.linear(h, f"{name}.q", f"{name}.q", bias=a.qkv_bias)
        k = self.linear(h, f"{name}.k", f"{name}.k", bias=a.qkv_bias)
        v = self.linear(h, f"{name}.v", f"{name}.v", bias=a.qkv_bias)
        if a.qk_norm is not None:
            whole = a.qk_norm_scope == "row"
            q = self.norm(q, f"{name}.q_norm", a.qk_norm, q.width if whole else a.head_dim)
            k = self.norm(k, f"{name}.k_norm", a.qk_norm, k.width if whole else a.head_dim)
        if a.rope is not None:
            q = self.rotate(q, f"{name}.q_rotated", a.rope, a.heads)
            k = self.rotate(k, f"{name}.k_rotated", a.rope, a.kv_heads)
        out = self.builder.value(f"{name}.out", a.heads * a.head_dim)
        sizes = a.heads, a.kv_heads, a.head_dim
        return self.builder.emit(
            Attend(out, q, k, v, SPANS, index, *sizes, a.scale, a.window, a.softcap)
        )

    def rotate(self, x: Value, name: str, rope: Rope, heads: int) -> Value:
        key = rope.frequencies(self.context)
        if key not in self.angles:
            suffix = f".{len(self.angles)}" if self.angles else ""
            out = self.builder.value(f"angles{suffix}", rope.dims)
            self.angles[key] = self.builder.emit(RopeAngles(out, ROTARY, *key))
        out = self.builder.value(name, x.width)
        dims = x.width // heads
        return self.builder.emit(Rotate(out, x, self.angles[key], heads, dims, rope.interleaved))

    def feed_forward(
        self, h: Value, name: str, out: str, f: Mlp | Moe, *, residual: Value | None = None
    ) -> Value:
        match f:
            case Moe():
                return self.experts(h, name, out, f, residual=residual)
            case Mlp(gated=True):
                inner = self.gated(h, name, f)
            case Mlp(activation=activation):
                up = f"{name}.up"
                inner = self.linear(h, up, up, bias=f.bias, activation=activation)
        return self.linear(inner, f"{name}.down", out, bias=f.bias, residual=residual)

    def gated(self, h: Value, name: str, f: Mlp) -> Value:
        gate, up = f"{name}.gate", f"{name}.up"
        out = self.builder.value(up, f.width, h.rows)
        g_bias, up_bias = (self.vector(f"{r}.bias") if f.bias else None for r in (gate, up))
        weights = self.matrix(gate), self.matrix(up)
        return self.builder.emit(GatedLinear(out, h, *weights, f.activation, g_bias, up_bias))

    def experts(self, h: Value, name: str, out: str, f: Moe, *, residual: Value | None) -> Value:
        scale = 1.0 if residual is None else self.decoder.residual_scale
        value = self.builder.value(out, h.width, h.rows)
        parts = ("router", "experts.gate", "experts.up", "experts.down")
        router, gate, up, down = (self.matrix(f"{name}.{part}") for part in parts)
        how = (f.top_k, f.activation, f.normalize, f.jitter, scale, residual)
        return self.builder.emit(MixtureOfExperts(value, h, router, gate, up, down, *how))

    def linear(
        self,
        x: Value,
        role: str,
        out: str,
        *,
        bias: bool,
        activation: Activation | None = None,
        residual: Value | None = None,
    ) -> Value:
        weight = self.matrix(role)
        scale = 1.0 if residual is None else self.decoder.residual_scale
        b = self.vector(f"{role}.bias") if bias else None
        value = self.builder.value(out, weight.rows, x.rows)
        return self.builder.emit(Linear(value, x, weight, b, activation, scale, residual))

    def norm(self, x: Value, role: str, norm: Norm, group: int | None = None) -> Value:
        weight = self.vector(f"{role}.weight", offset=1.0 if norm.unit_offset else 0.0)
        bias = self.vector(f"{role}.bias") if norm.bias else None
        out = self.builder.value(role, x.width, x.rows)
        run = x.width if group is None else group
        return self.builder.emit(Normalize(out, x, weight, bias, norm.kind, norm.eps, run))

    def add_normed(self, x: Value, y: Value, role: str, norm: Norm, name: str) -> Value:
        normed = self.norm(y, f"{role}.post_norm", norm)
        out = self.builder.value(name, x.width, x.rows)
        return self.builder.emit(Add(out, x, normed, self.decoder.residual_scale))

    def matrix(self, role: str) -> Matrix:
        *experts, rows, cols = self.shapes[f"{role}.weight"]
        return Matrix(self.names[f"{role}.weight"], rows, cols, math.prod(experts), role)

    def vector(self, role: str, *, offset: float = 0.0) -> Vector:
        return Vector(self.names[role], self.shapes[role][0], offset, role)
