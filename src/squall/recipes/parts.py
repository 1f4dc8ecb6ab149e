"""What the recipes of all file formats share: a configuration -> parts of a Spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes.fields import Fields
from squall.spec import Activation, Attention, Decoder, Layer, Mlp, Moe, Norm, Rope, Wiring

T = TypeVar("T")
Each: TypeAlias = T | tuple[T, ...]
"""One for all layers, or a tuple with one for each."""


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


def attention(c: Fields, rope: Each[Rope | None], **fields: Each[Any]) -> tuple[Attention, ...]:
    """The attention of every layer; `rope` and each of `fields` is for all, or a tuple has all."""
    layers, size = depth(c), head_dim(c)
    heads = c.counts("attention.head_count", layers=layers)
    key = "attention.head_count_kv"
    kv_heads = c.counts(key, layers=layers) if c.has(key) else heads
    for total, shared in zip(heads, kv_heads, strict=True):
        if total % shared:
            raise InvalidCheckpoint(
                f"{total} attention heads cannot share {shared} key-value heads"
            )
    fields = {"scale": size**-0.5, "rope": rope, **fields}
    return tuple(
        Attention(heads[i], kv_heads[i], size, **{k: _of(v, i) for k, v in fields.items()})
        for i in range(layers)
    )


def mlp(c: Fields, activation: Activation, *, gated: bool, bias: Each[bool]) -> tuple[Mlp, ...]:
    widths = c.counts("feed_forward_length", layers=depth(c))
    return tuple(Mlp(width, activation, gated, _of(bias, i)) for i, width in enumerate(widths))


def moe(
    c: Fields, activation: Activation, *, normalize: bool, jitter: float | None = None
) -> tuple[Moe, ...]:
    experts, used = c.count("expert_count", high=1024), c.count("expert_used_count", high=1024)
    if used > experts:
        raise InvalidCheckpoint(f"{used} of {experts} experts a token is out of range")
    widths = c.counts("feed_forward_length", layers=depth(c))
    if c.has("expert_feed_forward_length"):
        widths = (c.count("expert_feed_forward_length"),) * len(widths)
    return tuple(Moe(experts, used, width, activation, normalize, jitter) for width in widths)


def _of(value: Each[T], layer: int) -> T:
    return value[layer] if isinstance(value, tuple) else value


def decoder(
    c: Fields,
    norm: Norm,
    attention: Sequence[Attention],
    feed_forward: Sequence[Mlp | Moe],
    *,
    wiring: Wiring = "pre",
    **fields: Any,
) -> Decoder:
    """The Decoder with these parts in its layers; `fields` are its others."""
    parts = zip(attention, feed_forward, strict=True)
    layers = tuple(Layer(*pair, norm, wiring) for pair in parts)
    return Decoder(
        hidden=hidden(c), context=context(c), layers=layers, norm=norm, **(c.head() | fields)
    )
