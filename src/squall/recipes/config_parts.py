"""config.json -> parts of a Spec."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from squall import spec
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes import parts
from squall.recipes.config_fields import ConfigFields
from squall.recipes.parts import Each, context, depth, head_dim
from squall.spec import Activation, Attention, Mlp, Rope

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def activation(c: ConfigFields, key: str = "hidden_act") -> Activation:
    name = c.word(key)
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedModel(f"{key} is {quote(name)}, which is not supported; known: {known}")
    return ACTIVATIONS[name]


def rope(
    c: ConfigFields,
    *,
    theta: str = "rope_theta",
    interleaved: bool = False,
    scalings: Mapping[str, Scaling] | None = None,
    section: str | None = None,
) -> Rope:
    """The rotary embedding.

    theta: the key that counts where the parameters have no `rope_theta`.
    section: the layers' kind, where config.json may have parameters for each.
    scalings: those that differ from the usual.
    """
    at = "rope_scaling." if c.has_section("rope_scaling") else "rope_parameters."
    if section is not None and c.has_section(f"{at}{section}"):
        at = f"{at}{section}."
    base = c.number(theta, low=1.0, high=1e15)
    base = c.number(f"{at}rope_theta", base, low=1.0, high=1e15)
    share = c.number("partial_rotary_factor", 1.0, high=1.0)
    share = c.number(f"{at}partial_rotary_factor", share, high=1.0)
    dims = int(head_dim(c) * share)
    if dims % 2 or dims == 0:
        raise InvalidCheckpoint(
            f"{dims} of {head_dim(c)} elements of a head would be rotated; it must be an even count"
        )
    return Rope(base, dims, interleaved, scaling(c, at, dims, SCALINGS | dict(scalings or {})))


def sectioned(c: ConfigFields, rope: Rope) -> Rope:
    """The rotary embedding of positions with axes: `mrope_section` says how many turn with each."""
    at = "rope_scaling" if c.has_section("rope_scaling") else "rope_parameters"
    key = f"{at}.mrope_section"
    sizes: tuple[int, ...] = (16, 24, 24)
    if c.has(key):
        sizes = c.counts(key, layers=3)
    if sum(sizes) != rope.dims // 2:
        raise InvalidCheckpoint(f"{key} is {sizes}; its sum must be {rope.dims // 2}")
    return replace(rope, axes=tuple(axis for axis in range(3) for _ in range(sizes[axis])))


def scaling(
    c: ConfigFields, at: str, dims: int, scalings: Mapping[str, Scaling]
) -> spec.RopeScaling | None:
    kind = c.word(f"{at}rope_type", c.word(f"{at}type", "default"))
    if kind not in scalings:
        known = ", ".join(scalings)
        raise UnsupportedModel(f"rope scaling {quote(kind)} is not supported; known: {known}")
    c.skip("original_max_position_embeddings")
    return scalings[kind](c, at, dims)


Scaling = Callable[[ConfigFields, str, int], spec.RopeScaling | None]


def _original_context(c: ConfigFields, at: str) -> int:
    key = "original_max_position_embeddings"
    own = c.count(f"{at}{key}", context(c), high=1 << 30)
    return c.count(key, own, high=1 << 30)


def _linear(c: ConfigFields, at: str, _dims: int) -> spec.LinearScaling:
    return spec.LinearScaling(c.number(f"{at}factor"))


def _dynamic(c: ConfigFields, at: str, _dims: int) -> spec.DynamicScaling:
    c.skip(f"{at}original_max_position_embeddings")
    return spec.DynamicScaling(c.number(f"{at}factor", low=1.0, high=1e4), context(c))


def _llama3(c: ConfigFields, at: str, _dims: int) -> spec.Llama3Scaling:
    low, high = c.number(f"{at}low_freq_factor"), c.number(f"{at}high_freq_factor")
    if not low < high:
        raise InvalidCheckpoint(f"{at}low_freq_factor is {low}; it must be below {high}")
    return spec.Llama3Scaling(c.number(f"{at}factor"), low, high, _original_context(c, at))


def _yarn(c: ConfigFields, at: str, _dims: int) -> spec.YarnScaling:
    if not c.flag(f"{at}truncate", True):
        raise UnsupportedModel(f"{at}truncate is false, which is not supported")
    original = _original_context(c, at)
    factor = c.optional(f"{at}factor") or context(c) / original
    multiplier, divisor = c.optional(f"{at}mscale"), c.optional(f"{at}mscale_all_dim")
    magnitude = c.optional(f"{at}attention_factor")
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    if magnitude is None and multiplier is not None and divisor is not None:
        magnitude = (multiplier * growth + 1.0) / (divisor * growth + 1.0)
    return spec.YarnScaling(
        factor,
        original,
        c.optional(f"{at}beta_fast") or 32.0,
        c.optional(f"{at}beta_slow") or 1.0,
        growth + 1.0 if magnitude is None else magnitude,
    )


def long_rope(c: ConfigFields, at: str, dims: int) -> spec.FactorScaling:
    """Factors for short and for long contexts; both with one magnitude."""
    original = _original_context(c, at)
    factor = c.optional(f"{at}factor") or context(c) / original
    growth = math.log(factor) / math.log(original) if factor > 1 < original else 0.0
    magnitude = c.optional(f"{at}attention_factor") or math.sqrt(1.0 + growth)
    short, long = (c.numbers(f"{at}{kind}_factor", dims // 2) for kind in ("short", "long"))
    return spec.FactorScaling(short, long, original, magnitude)


def long_rope_with_magnitudes(c: ConfigFields, at: str, dims: int) -> spec.FactorScaling:
    """Factors and magnitudes for short and for long contexts."""
    short, long = (c.numbers(f"{at}{kind}_factor", dims // 2) for kind in ("short", "long"))
    magnitudes = (c.number(f"{at}{kind}_mscale") for kind in ("short", "long"))
    return spec.FactorScaling(short, long, _original_context(c, at), *magnitudes)


SCALINGS: dict[str, Scaling] = {
    "default": lambda _c, _at, _dims: None,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": long_rope,
}


def window(c: ConfigFields) -> int | None:
    return c.optional_count("sliding_window")


def windows(c: ConfigFields, *, period: int) -> tuple[int | None, ...]:
    """The attention window of each layer: by their kinds, or of all but every `period`-th."""
    layers, size = depth(c), window(c)
    marks = c.pattern("sliding_window_pattern", period, layers=layers)
    if c.has("layer_types"):
        marks = layer_marks(c, layers)
    return tuple(size if mark else None for mark in marks)


def layer_marks(c: ConfigFields, layers: int) -> tuple[bool, ...]:
    """Which layers have a window, by `layer_types`."""
    kinds = c.words("layer_types", layers=layers)
    if not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise UnsupportedModel(
            f"layer_types are {', '.join(sorted(set(kinds)))[:200]!r}; "
            "known: sliding_attention, full_attention"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def switched_windows(c: ConfigFields, marks: Sequence[bool]) -> tuple[int | None, ...]:
    """The window of each layer, in models with a `use_sliding_window`.

    marks: which layers have one where the file has no `layer_types`.
    """
    if not c.flag("use_sliding_window", False):
        c.skip("sliding_window", "layer_types")
        return (None,) * len(marks)
    size = window(c)
    if c.has("layer_types"):
        marks = layer_marks(c, len(marks))
    return tuple(size if mark else None for mark in marks)


def upper_layers(c: ConfigFields) -> tuple[bool, ...]:
    """The layers from `max_window_layers` on."""
    first = c.count("max_window_layers", 28, high=1 << 20)
    return tuple(i >= first for i in range(depth(c)))


def attention(
    c: ConfigFields, rope: Each[Rope | None], **fields: Each[Any]
) -> tuple[Attention, ...]:
    """The attention of every layer; all its linears have a bias or none, where `fields` don't say.

    `rope` and each of `fields` is for all layers, or a tuple has one for each.
    """
    bias = c.flag("attention_bias", False)
    return parts.attention(c, rope, **({"qkv_bias": bias, "out_bias": bias} | fields))


def mlp(c: ConfigFields, key: str = "hidden_act") -> tuple[Mlp, ...]:
    """The gated MLP of every layer; `key` is that of its activation."""
    bias = c.flag("mlp_bias", False)
    return parts.mlp(c, activation(c, key), gated=True, bias=bias)
