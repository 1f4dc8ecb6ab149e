"""Which weights a network has: a role such as `layers.3.attention.q.weight`, and its shape.

Recipes find a checkpoint tensor for every role, `squall.decoder` and `squall.vision` use it;
all take the shapes from here.
"""

from __future__ import annotations

from collections.abc import Sequence

from squall.spec import (
    Attention,
    AutoEncoder,
    Connector,
    Decoder,
    Encoder,
    Flux,
    Head,
    Layer,
    Mlp,
    Moe,
    Norm,
    Perceiver,
    Tower,
)

Network = Decoder | Tower | Connector | Perceiver | Encoder | Head | AutoEncoder | Flux

Shapes = dict[str, tuple[int, ...]]

# Wirings with norms before attention, between it and the feed-forward, and after each.
HAS_PRE_NORM = frozenset(("pre", "sandwich", "parallel"))
HAS_MIDDLE_NORM = frozenset(("pre", "late", "sandwich"))
HAS_POST_NORM = frozenset(("sandwich", "post", "sum"))
# By whether it recalls.
ATTENTION = {False: "attention", True: "recall"}

_GROUPS = Norm("layer", 1e-6, bias=True)  # what stands for norms of groups: they have biases


def roles(network: Network) -> Shapes:
    """Every weight: matrices `[rows, cols]`, experts `[experts, rows, cols]`, vectors `[size]`.

    And convolutions `[rows, channels, 3, 3]`.
    """
    match network:
        case AutoEncoder():
            return _auto_encoder(network)
        case Decoder():
            return _decoder(network)
        case Tower():
            return _tower(network)
        case Connector():
            return _connector(network)
        case Perceiver():
            return _perceiver(network)
        case Encoder():
            return _encoder(network)
        case Head():
            return _head(network)
        case Flux():
            return _flux(network)


def _decoder(decoder: Decoder) -> Shapes:
    shapes = _linear("embed", decoder.vocab + decoder.more_ids, decoder.hidden)
    shapes |= _layers(decoder.layers, decoder.hidden)
    shapes |= _norm("norm", decoder.norm, decoder.hidden)
    if not decoder.tied:
        shapes |= _linear("head", decoder.vocab, decoder.hidden)
    if decoder.head_bias:
        shapes["head.bias"] = (decoder.vocab,)
    return shapes


def _tower(tower: Tower) -> Shapes:
    shapes = _linear("patches", tower.hidden, tower.patch, bias=tower.bias)
    if tower.class_token:
        shapes["class.weight"] = (1, tower.hidden)
    if tower.positions:
        shapes["positions.weight"] = (tower.positions, tower.hidden)
    for role, norm in (("pre_norm", tower.pre_norm), ("norm", tower.norm)):
        shapes |= _norm(role, norm, tower.hidden) if norm is not None else {}
    if (tiles := tower.tiles) is not None:
        rows = {"before": tiles.most, "places": tiles.most * tower.positions, "after": tiles.most}
        shapes |= {
            f"tiles.{role}.positions.weight": (tiles.shapes, count, tower.hidden)
            for role, count in rows.items()
        }
        shapes |= _layers(tiles.late, tower.hidden, "late")
    return shapes | _layers(tower.layers, tower.hidden)


def _connector(connector: Connector) -> Shapes:
    width = connector.tower
    shapes = _norm("norm", connector.norm, width) if connector.norm is not None else {}
    merged = width * connector.merge
    if connector.mix:
        shapes |= _linear("mix", width, merged)
    width = width if connector.mean or connector.mix else merged
    hidden = width if connector.early else connector.widths[-1]
    for index, rows in enumerate(connector.widths):
        shapes |= _linear(f"linear{index}", rows, width, bias=connector.bias)
        width = rows
    return shapes | (_linear("newline", connector.newlines, hidden) if connector.newlines else {})


def _perceiver(p: Perceiver) -> Shapes:
    shapes = {"latents.weight": (p.latents, p.hidden)} | _layers(p.layers, p.hidden)
    shapes |= _mlp("mlp", p.mlp, p.tower, p.hidden) | _norm("norm", p.norm, p.hidden)
    for index, layer in enumerate(p.layers):
        shapes |= _norm(f"layers.{index}.attention.context_norm", layer.norm, p.hidden)
    return shapes


def _encoder(e: Encoder) -> Shapes:
    shapes = _linear("embed", e.vocab, e.hidden)
    for role, rows in (("positions", e.positions), ("types", e.types)):
        shapes |= _linear(role, rows, e.hidden) if rows else {}
    for role, norm in (("embed_norm", e.embed_norm), ("norm", e.norm)):
        shapes |= _norm(role, norm, e.hidden) if norm is not None else {}
    if e.relative is not None:
        shapes["relative.weight"] = (e.relative.buckets * e.layers[0].attention.heads,)
    return shapes | _layers(e.layers, e.hidden)


def _head(head: Head) -> Shapes:
    shapes, width = Shapes(), head.width
    for index, dense in enumerate(head.layers):
        shapes |= _linear(f"dense{index}", dense.width, width, bias=dense.bias)
        width = dense.width
        shapes |= _norm(f"norm{index}", dense.norm, width) if dense.norm is not None else {}
    return shapes


FLUX_STREAMS = ("text", "picture")


def _flux(f: Flux) -> Shapes:
    width = f.hidden
    shapes = _linear("picture_in", width, f.patch, bias=True)
    shapes |= _linear("text_in", width, f.text, bias=True)
    told = {"time": 256, "pooled": f.pooled, **({"guidance": 256} if f.guidance else {})}
    for role, cols in told.items():
        shapes |= _linear(f"{role}.in", width, cols, bias=True)
        shapes |= _linear(f"{role}.out", width, width, bias=True)
    for index in range(f.double):
        for stem in (f"layers.{index}.{kind}" for kind in FLUX_STREAMS):
            shapes |= _linear(f"{stem}.modulation", 6 * width, width, bias=True)
            shapes |= _flux_heads(f"{stem}.attention", f)
            shapes |= _linear(f"{stem}.attention.out", width, width, bias=True)
            shapes |= _linear(f"{stem}.feed_forward.up", f.mlp, width, bias=True)
            shapes |= _linear(f"{stem}.feed_forward.down", width, f.mlp, bias=True)
    for stem in (f"layers.{index}" for index in range(f.double, f.double + f.single)):
        shapes |= _linear(f"{stem}.modulation", 3 * width, width, bias=True)
        shapes |= _flux_heads(f"{stem}.attention", f)
        shapes |= _linear(f"{stem}.feed_forward.up", f.mlp, width, bias=True)
        shapes |= _linear(f"{stem}.out", width, width + f.mlp, bias=True)
    for part in ("shift", "scale"):
        shapes |= _linear(f"final.{part}", width, width, bias=True)
    return shapes | _linear("final.out", f.patch, width, bias=True)


def _flux_heads(role: str, f: Flux) -> Shapes:
    shapes: Shapes = {f"{role}.{part}_norm.weight": (f.head_dim,) for part in "qk"}
    for part in "qkv":
        shapes |= _linear(f"{role}.{part}", f.heads * f.head_dim, f.hidden, bias=True)
    return shapes


def _auto_encoder(a: AutoEncoder) -> Shapes:
    """Named as FLUX's own files have them; levels are resolutions, the finest first."""
    levels, first, middle = [*enumerate(a.widths)], a.widths[0], a.widths[-1]
    shapes = _levels("encoder.down", "downsample", levels, a.blocks)
    shapes |= _levels("decoder.up", "upsample", levels[::-1], a.blocks + 1)
    for side, given, begin, end, made in (
        ("encoder", 3, first, middle, 2 * a.latent),
        ("decoder", a.latent, middle, first, 3),
    ):
        shapes |= _convolution(f"{side}.conv_in", begin, given)
        for block in ("block_1", "block_2"):
            shapes |= _residual(f"{side}.mid.{block}", middle, middle)
        if a.attends:
            shapes |= _norm(f"{side}.mid.attn_1.norm", _GROUPS, middle)
            for part in ("q", "k", "v", "proj_out"):
                shapes |= _linear(f"{side}.mid.attn_1.{part}", middle, middle, bias=True)
        shapes |= _norm(f"{side}.norm_out", _GROUPS, end)
        shapes |= _convolution(f"{side}.conv_out", made, end)
    return shapes


def _levels(stem: str, sample: str, levels: Sequence[tuple[int, int]], blocks: int) -> Shapes:
    """Of levels and their widths, in the order in which they are run."""
    shapes, given = Shapes(), levels[0][1]
    for level, width in levels:
        for block in range(blocks):
            shapes |= _residual(f"{stem}.{level}.block.{block}", width, given)
            given = width
        if level != levels[-1][0]:
            shapes |= _convolution(f"{stem}.{level}.{sample}.conv", width, width)
    return shapes


def _residual(role: str, rows: int, channels: int) -> Shapes:
    shapes = _norm(f"{role}.norm1", _GROUPS, channels) | _norm(f"{role}.norm2", _GROUPS, rows)
    shapes |= _convolution(f"{role}.conv1", rows, channels)
    shapes |= _convolution(f"{role}.conv2", rows, rows)
    if rows != channels:
        shapes |= _linear(f"{role}.nin_shortcut", rows, channels, bias=True)
    return shapes


def _convolution(role: str, rows: int, channels: int) -> Shapes:
    return {f"{role}.weight": (rows, channels, 3, 3), f"{role}.bias": (rows,)}


def _layers(layers: Sequence[Layer], hidden: int, name: str = "layers") -> Shapes:
    return {
        f"{name}.{index}.{role}": shape
        for index, layer in enumerate(layers)
        for role, shape in _layer(layer, hidden).items()
    }


def _linear(role: str, rows: int, cols: int, *, bias: bool = False) -> Shapes:
    weight: Shapes = {f"{role}.weight": (rows, cols)}
    return weight | {f"{role}.bias": (rows,)} if bias else weight


def _norm(role: str, norm: Norm, size: int) -> Shapes:
    weight: Shapes = {f"{role}.weight": (size,)}
    return weight | {f"{role}.bias": (size,)} if norm.bias else weight


def _layer(layer: Layer, hidden: int) -> Shapes:
    shapes: Shapes = {}
    kind = ATTENTION[layer.attention.recalls]
    if layer.wiring in HAS_PRE_NORM:
        shapes |= _norm(f"{kind}.norm", layer.norm, hidden)
    shapes |= _attention(kind, layer.attention, hidden)
    if layer.wiring in HAS_POST_NORM:
        shapes |= _norm(f"{kind}.post_norm", layer.norm, hidden)
    if layer.wiring in HAS_MIDDLE_NORM:
        shapes |= _norm("feed_forward.norm", layer.norm, hidden)
    shapes |= _feed_forward(layer.feed_forward, hidden)
    if layer.wiring in HAS_POST_NORM:
        shapes |= _norm("feed_forward.post_norm", layer.norm, hidden)
    return shapes


def _attention(kind: str, a: Attention, hidden: int) -> Shapes:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = _linear(f"{kind}.q", q, hidden, bias=a.qkv_bias)
    shapes |= _linear(f"{kind}.k", kv, hidden, bias=a.qkv_bias)
    shapes |= _linear(f"{kind}.v", kv, hidden, bias=a.qkv_bias)
    if a.qk_norm is not None:
        shared = a.qk_norm_scope == "head"
        shapes |= _norm(f"{kind}.q_norm", a.qk_norm, a.head_dim if shared else q)
        shapes |= _norm(f"{kind}.k_norm", a.qk_norm, a.head_dim if shared else kv)
    return shapes | _linear(f"{kind}.out", hidden, q, bias=a.out_bias)


def _mlp(role: str, f: Mlp, cols: int, rows: int) -> Shapes:
    gate = _linear(f"{role}.gate", f.width, cols, bias=f.bias) if f.gated else {}
    up = _linear(f"{role}.up", f.width, cols, bias=f.bias)
    return gate | up | _linear(f"{role}.down", rows, f.width, bias=f.bias)


def _feed_forward(f: Mlp | Moe, hidden: int) -> Shapes:
    match f:
        case Mlp():
            return _mlp("feed_forward", f, hidden, hidden)
        case Moe(experts=experts, width=width):
            return {
                "feed_forward.router.weight": (experts, hidden),
                "feed_forward.experts.gate.weight": (experts, width, hidden),
                "feed_forward.experts.up.weight": (experts, width, hidden),
                "feed_forward.experts.down.weight": (experts, hidden, width),
            }
