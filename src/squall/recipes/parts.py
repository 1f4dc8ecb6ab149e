"""What the recipes share: GGUF metadata -> parts of a Spec. Tensors tell which biases there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from squall.checkpoints.gguf_header import quote
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes.fields import Fields
from squall.spec import (
    Activation,
    Attention,
    Decoder,
    FactorScaling,
    Layer,
    LinearScaling,
    Mlp,
    Moe,
    Norm,
    Rope,
    RopeScaling,
    Wiring,
    YarnScaling,
)


def rms(c: Fields) -> Norm:
    return Norm("rms", c.number("attention.layer_norm_rms_epsilon", low=1e-15, high=1.0))


def layer_norm(c: Fields) -> Norm:
    return Norm("layer", c.number("attention.layer_norm_epsilon", low=1e-15, high=1.0), bias=True)


def depth(c: Fields) -> int:
    return c.count("block_count", high=4096)


def hidden(c: Fields) -> int:
    return c.count("embedding_length")


def context(c: Fields) -> int:
    return c.count("context_length", high=1 << 30)


def head_dim(c: Fields) -> int:
    heads = c.counts("attention.head_count", layers=depth(c))
    size = c.count("attention.key_length", max(hidden(c) // heads[0], 1), high=1 << 16)
    if c.count("attention.value_length", size) != size:
        raise UnsupportedModel("keys and values of different lengths are not supported")
    return size


def rope(
    c: Fields, *, interleaved: bool = False, scaled: bool = True, theta: float | None = None
) -> Rope:
    """The rotary embedding; `theta` and `scaled` are for layers that differ from the others."""
    size = head_dim(c)
    dims = c.count("rope.dimension_count", size, high=size)
    if dims % 2:
        raise InvalidCheckpoint(f"{c.architecture}.rope.dimension_count is {dims}; it must be even")
    base = c.number("rope.freq_base", 10000.0, low=1.0, high=1e15) if theta is None else theta
    return Rope(base, dims, interleaved, scaling(c, dims) if scaled else None)


def scaling(c: Fields, dims: int) -> RopeScaling | None:
    """The rope scaling of the metadata, or of the tensors that hold one factor a frequency."""
    factors = _factors(c, dims)
    factor = c.optional("rope.scaling.factor") or c.optional("rope.scale_linear") or 1.0
    kind = c.word("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if kind == "longrope" and factors is None:
        raise InvalidCheckpoint(
            "rope scaling is 'longrope', but the rope factor tensors are missing"
        )
    if factors is not None:
        if kind not in ("none", "longrope") or factor != 1.0:
            raise UnsupportedModel(
                f"rope scaling {quote(kind)} with rope factor tensors is not supported"
            )
        return factors
    if kind not in SCALINGS:
        known = ", ".join([*SCALINGS, "longrope"])
        raise UnsupportedModel(f"rope scaling {quote(kind)} is not supported; known: {known}")
    if kind != "yarn" and _magnitude(c) != 1.0:
        raise UnsupportedModel(
            f"rope scaling {kind!r} with rope.scaling.attn_factor is not supported"
        )
    return SCALINGS[kind](c, factor)


def _magnitude(c: Fields) -> float:
    return c.number("rope.scaling.attn_factor", 1.0, high=1e3)


def _original_context(c: Fields) -> int:
    return c.count("rope.scaling.original_context_length", context(c), high=1 << 30)


def _factors(c: Fields, dims: int) -> FactorScaling | None:
    original, magnitude = _original_context(c), _magnitude(c)
    same = c.factors("rope_freqs.weight", dims // 2)
    short = c.factors("rope_factors_short.weight", dims // 2)
    long = c.factors("rope_factors_long.weight", dims // 2)
    if same is not None and short is None and long is None:
        return FactorScaling(same, same, original, magnitude)
    if same is None and short is not None and long is not None:
        return FactorScaling(short, long, original, magnitude)
    if same is short is long is None:
        return None
    raise InvalidCheckpoint("the rope factor tensors are incomplete: 'short' and 'long' are needed")


def _yarn(c: Fields, factor: float) -> YarnScaling:
    extrapolation = c.number("rope.scaling.yarn_ext_factor", 1.0)
    if extrapolation != 1.0:
        raise UnsupportedModel(
            f"YaRN with yarn_ext_factor {extrapolation:g} is not supported; only 1 is"
        )
    base = YarnScaling(
        factor,
        _original_context(c),
        c.number("rope.scaling.yarn_beta_fast", 32.0, low=1e-3),
        c.number("rope.scaling.yarn_beta_slow", 1.0, low=1e-3),
    )
    magnitude = c.optional("rope.scaling.yarn_attn_factor")
    multiplier = c.optional("rope.scaling.yarn_log_multiplier")
    if magnitude is None:
        growth = 0.1 * math.log(factor) if factor > 1 else 0.0
        magnitude = (growth + 1.0) / ((multiplier or 0.0) * growth + 1.0)
    return replace(base, magnitude=magnitude * _magnitude(c))


SCALINGS: Mapping[str, Callable[[Fields, float], RopeScaling | None]] = {
    "none": lambda _c, _factor: None,
    "linear": lambda _c, factor: LinearScaling(factor) if factor != 1.0 else None,
    "yarn": _yarn,
}


def windows(c: Fields, *, period: int = 0, default: int | None = None) -> tuple[int | None, ...]:
    """The attention window of each layer; all but every `period`-th have one (0: all have)."""
    layers = depth(c)
    key = "attention.sliding_window"
    size = c.optional_count(key) if c.has(key) else default
    marks = c.pattern("attention.sliding_window_pattern", period, layers=layers)
    return tuple(size if mark else None for mark in marks)


def attention(c: Fields, layer: int, rope: Rope | None, **changes: object) -> Attention:
    """The attention of `layer`; `changes` replace fields."""
    layers, size = depth(c), head_dim(c)
    heads = c.counts("attention.head_count", layers=layers)[layer]
    kv_heads = c.counts("attention.head_count_kv", heads, layers=layers)[layer]
    if heads % kv_heads:
        raise InvalidCheckpoint(f"{heads} attention heads cannot share {kv_heads} key-value heads")
    names = [f"blk.{layer}.attn_{part}.bias" for part in ("q", "k", "v", "qkv")]
    base = Attention(
        heads,
        kv_heads,
        size,
        c.optional("attention.scale") or size**-0.5,
        rope,
        qkv_bias=any(name in c.tensors for name in names),
        out_bias=f"blk.{layer}.attn_output.bias" in c.tensors,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def mlp(c: Fields, layer: int, activation: Activation, *, gated: bool = True) -> Mlp:
    width = c.counts("feed_forward_length", layers=depth(c))[layer]
    return Mlp(width, activation, gated, f"blk.{layer}.ffn_down.bias" in c.tensors)


def mlp_or_moe(c: Fields, layer: int, activation: Activation) -> Mlp | Moe:
    """A mixture of experts where the metadata counts experts, else a gated MLP."""
    experts = c.optional_count("expert_count")
    used = c.optional_count("expert_used_count")
    if experts is None:
        return mlp(c, layer, activation)
    if used is None or not used <= experts <= 1024:
        raise InvalidCheckpoint(f"{used} of {experts} experts a token is out of range")
    width = c.counts("feed_forward_length", layers=depth(c))[layer]
    width = c.count("expert_feed_forward_length", width)
    return Moe(experts, used, width, activation, c.flag("expert_weights_norm", True))


def decoder(
    c: Fields,
    norm: Norm,
    attention: Callable[[int], Attention],
    feed_forward: Callable[[int], Mlp | Moe],
    *,
    wiring: Wiring = "pre",
    embed_scale: float = 1.0,
) -> Decoder:
    """A Decoder of the metadata's sizes; the functions give the parts of each layer."""
    if "token_embd.weight" not in c.tensors:
        raise InvalidCheckpoint("the tensor 'token_embd.weight' is missing")
    return Decoder(
        vocab=c.tensors["token_embd.weight"].shape[0],
        hidden=hidden(c),
        context=context(c),
        layers=tuple(Layer(attention(i), feed_forward(i), norm, wiring) for i in range(depth(c))),
        norm=norm,
        tied="output.weight" not in c.tensors,
        head_bias="output.bias" in c.tensors,
        embed_scale=embed_scale,
        logit_softcap=c.optional("final_logit_softcapping"),
    )
