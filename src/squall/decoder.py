"""Spec -> program: the one decoder implementation, for any model a `spec.Decoder` can describe."""

from __future__ import annotations

from dataclasses import replace

from squall import program as p
from squall.blocks import Blocks, Reach
from squall.roles import roles
from squall.spec import Decoder

TOKENS = p.Index("tokens")
SPANS = p.Index("spans", axes=2)
OUTPUTS = p.Index("outputs", rows="outputs")
# Rows of images in this run, and which of them stands in place of a token's embedding.
IMAGES, OVERLAY = "images", p.Index("overlay")
# What a row sees of its sequence's memory.
SEEN = p.Index("seen", axes=2)


def compile(decoder: Decoder, names: p.Names, *, context: int, whole: bool = False) -> p.Program:
    """The program of `decoder` with the weights of `names`, for up to `context` tokens.

    whole: the last layer is computed for all rows, not only those whose logits are wanted.
    """
    # Where a row is for its rotary embedding; its place in the cache comes with its sequence.
    ropes = (layer.attention.rope for layer in decoder.layers)
    axes = max((max(rope.axes, default=0) + 1 for rope in ropes if rope), default=1)
    rotary = p.Index("rotary", axes=axes)
    b = Blocks(names, roles(decoder), rotary, context, decoder.residual_scale)
    return _program(decoder, b, whole=whole)


def compile_memory(decoder: Decoder, names: p.Names) -> p.Program:
    """Rows of images in; out the keys and values of each layer that recalls, one layer's by one."""
    b = Blocks(names, roles(decoder), p.Index("rotary", "image"))
    image = b.builder.value("image", decoder.hidden, "image")
    layers = [(i, layer.attention) for i, layer in enumerate(decoder.layers)]
    made = [b.heads(f"layers.{i}.recall", a, k=image, v=image) for i, a in layers if a.recalls]
    return b.builder.build(*(value for pair in made for value in pair), inputs=[image])


def _program(d: Decoder, b: Blocks, *, whole: bool) -> p.Program:
    new = b.builder.value
    table = b.matrix("embed")
    x = b.builder.emit(p.Embed(new("embed", d.hidden), TOKENS, table, d.embed_scale))
    inputs = []
    if d.sees:
        inputs.append(new(IMAGES, d.hidden, IMAGES))
        x = b.builder.emit(p.Overlay(new("overlaid", d.hidden), x, inputs[0], OVERLAY))

    def outputs(x: p.Value) -> p.Value:
        return b.builder.emit(
            p.GatherRows(new(f"{x.name}.outputs", x.width, "outputs"), x, OUTPUTS)
        )

    caches: dict[bool, list[p.CacheLayer]] = {False: [], True: []}
    for index, layer in enumerate(d.layers):
        # Other rows than the outputs' are in the last layer for its keys and values only.
        last = {} if whole or index < len(d.layers) - 1 else {"chosen": outputs}
        a = layer.attention
        reach = Reach(SEEN if a.recalls else SPANS, len(caches[a.recalls]))
        caches[a.recalls].append(p.CacheLayer(a.kv_heads, a.head_dim))
        x = b.layer(x, f"layers.{index}", layer, reach, **last)
    x = b.norm(x, "norm", d.norm)
    x = outputs(x) if whole else x
    head = replace(table, role="head") if d.tied else b.matrix("head")
    capped = d.logit_softcap is not None
    bias = b.vector("head.bias") if d.head_bias else None
    out = new("head" if capped else "logits", d.vocab, "outputs")
    logits = b.builder.emit(p.Linear(out, x, head, bias, scale=d.logit_scale))
    if d.logit_softcap is not None:
        out = new("logits", d.vocab, "outputs")
        logits = b.builder.emit(p.Softcap(out, logits, d.logit_softcap))
    kept = {"caches": caches[False], "memories": caches[True]}
    return b.builder.build(logits, inputs=inputs, context=b.context, **kept)
