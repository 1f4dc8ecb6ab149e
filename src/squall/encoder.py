"""Spec -> program: ids of tokens in, a row for each of them, or for some of them, out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from squall import program as p
from squall.blocks import Blocks, Reach
from squall.roles import roles
from squall.spec import Decoder, Encoder, Head, Layer, Relative

Int32 = NDArray[np.int32]
TOKENS, SPANS, POSITIONS = p.Index("tokens"), p.Index("spans", axes=2), p.Index("positions")
# Of each token: where it is for its rotary embedding, and which of two texts it is of.
ROTARY, TYPES = p.Index("rotary"), p.Index("types")
# The rows that are wanted.
OUTPUTS = p.Index("outputs", rows="outputs")
# The output, [tokens, hidden] or [outputs, hidden]; of a head, whose input is of one row a text.
STATES, POOLED = "states", "pooled"


def compile(spec: Encoder, names: p.Names) -> p.Program:
    """The program that reads one text."""
    b = Blocks(names, roles(spec), ROTARY, prefix="encoder.")
    reach = _alone(b, spec)
    return b.builder.build(_layers(b, spec, lambda _: reach, some=False))


def _alone(b: Blocks, spec: Encoder) -> Reach:
    """The text of a run sees itself."""
    if spec.relative is None:
        return Reach(SPANS)
    relative = b.vector("relative.weight")
    return Reach(SPANS, relative=relative, buckets=buckets(spec.relative))


def compile_texts(
    spec: Encoder | Decoder, names: p.Names, *, context: int, causal: bool, some: bool
) -> p.Program:
    """The program that reads many texts in one run, each a sequence of up to `context` tokens.

    Keys and values lie in a cache of the run, in which each text begins a block: so its sums are
    added up as if it were alone. Layers that are alike share it, as one runs after the other.
    causal: a token sees those before it, not all. some: only rows of `outputs` are wanted.
    With relative positions there is no cache: a run is one text (`reads_one`).
    """
    if isinstance(spec, Encoder):
        b = Blocks(names, roles(spec), ROTARY, context, prefix="encoder.")
        if reads_one(spec):
            alone = _alone(b, spec)
            return b.builder.build(_layers(b, spec, lambda _: alone, some=some))
    else:
        b = Blocks(names, roles(spec), ROTARY, context, spec.residual_scale)
    caches = list(dict.fromkeys(_cache(layer) for layer in spec.layers))

    def reach(layer: Layer) -> Reach:
        window = None if causal else layer.attention.window
        return Reach(SPANS if window is None else local(window), caches.index(_cache(layer)))

    x = _layers(b, spec, reach, some=some)
    return b.builder.build(x, caches=caches, context=context)


def reads_one(spec: Encoder | Decoder) -> bool:
    return isinstance(spec, Encoder) and spec.relative is not None


def compile_head(head: Head, names: p.Names) -> p.Program:
    """One row a text in, and out."""
    b = Blocks(names, roles(head), ROTARY, prefix="head.")
    x = given = b.builder.value(POOLED, head.width, OUTPUTS.rows)
    for index, dense in enumerate(head.layers):
        name = f"dense{index}"
        own = None if dense.activation == "tanh" else dense.activation
        x = b.linear(x, name, name, bias=dense.bias, activation=own)
        if dense.activation == "tanh":
            out = b.builder.value(f"tanh{index}", x.width, x.rows)
            x = b.builder.emit(p.Softcap(out, x, 1.0))
        x = b.norm(x, f"norm{index}", dense.norm) if dense.norm is not None else x
    return b.builder.build(x, inputs=[given])


def local(window: int) -> p.Index:
    """What a row sees that sees `window` tokens to each side, itself counted."""
    return p.Index(f"spans.{window}", axes=2)


def _cache(layer: Layer) -> p.CacheLayer:
    return p.CacheLayer(layer.attention.kv_heads, layer.attention.head_dim)


def _layers(
    b: Blocks, spec: Encoder | Decoder, reach: Callable[[Layer], Reach], *, some: bool
) -> p.Value:
    def outputs(x: p.Value) -> p.Value:
        out = b.builder.value(f"{x.name}.outputs", x.width, OUTPUTS.rows)
        return b.builder.emit(p.GatherRows(out, x, OUTPUTS))

    x = _embedded(b, spec)
    for index, layer in enumerate(spec.layers):
        seen = reach(layer)
        if seen.spans != SPANS:  # which say it
            layer = replace(layer, attention=replace(layer.attention, window=None))
        last = {"chosen": outputs} if some and index == len(spec.layers) - 1 else {}
        x = b.layer(x, f"layers.{index}", layer, seen, **last)
    return x if spec.norm is None else b.norm(x, "norm", spec.norm, out=STATES)


def _embedded(b: Blocks, spec: Encoder | Decoder) -> p.Value:
    if isinstance(spec, Decoder):
        return _looked_up(b, "embed", TOKENS, spec.embed_scale)
    x = _looked_up(b, "embed", TOKENS)
    for role, index, count in (
        ("types", TYPES, spec.types),
        ("positions", POSITIONS, spec.positions),
    ):
        if count:
            out = b.builder.value(f"{role}.added", x.width)
            x = b.builder.emit(p.Add(out, x, _looked_up(b, role, index)))
    return x if spec.embed_norm is None else b.norm(x, "embed_norm", spec.embed_norm)


def _looked_up(b: Blocks, role: str, index: p.Index, scale: float = 1.0) -> p.Value:
    table = b.matrix(role)
    return b.builder.emit(p.Embed(b.builder.value(role, table.cols), index, table, scale))


def buckets(relative: Relative) -> tuple[int, ...]:
    """The bucket of a key's position less its query's, from -farthest to farthest.

    In float32, as models are trained with: where one bucket ends, its roundings decide.
    """
    half, near = relative.buckets // 2, relative.buckets // 4
    apart = np.arange(relative.farthest + 1)
    ratio = np.log(np.maximum(apart, near).astype(np.float32) / np.float32(near))
    share = ratio / np.float32(np.log(relative.farthest / near))
    far = near + (share * np.float32(half - near)).astype(np.int64)
    found = np.where(apart < near, apart, np.minimum(far, half - 1)).tolist()
    return (*reversed(found[1:]), *found[:1], *(half + bucket for bucket in found[1:]))


def inputs(spec: Encoder, ids: Sequence[int], *, causal: bool) -> dict[str, Int32]:
    """What a run is given of one text. causal: a token sees those before it, not all."""
    own = np.arange(len(ids), dtype=np.int32)
    ends = own + 1 if causal else np.full_like(own, len(ids))
    made = {"tokens": np.array(ids, np.int32), "spans": np.stack([np.zeros_like(ends), ends])}
    return made | ({"positions": own + np.int32(spec.first)} if spec.positions else {})
