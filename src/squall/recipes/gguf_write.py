"""A Decoder -> GGUF metadata, the reverse of `recipes.gguf`, which is asked whether it is right."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall import spec
from squall.checkpoints.base import ByteTensor
from squall.errors import SquallError, UnsupportedModel
from squall.recipes import config, gguf
from squall.recipes.gguf_parts import NAMING, GgufFields
from squall.roles import roles
from squall.spec import Attention, Decoder, Moe, Rope

# Names for people are those of GGUF, which has no names of its own for what is like LLaMA.
ARCHITECTURES = {config.NAMES[name]: name for name in gguf.RECIPES} | {
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
}
# Whose q and k rows are permuted, so that pairs are rotated.
INTERLEAVED = ("llama", "granite", "smollm3")
_TOLERANCE = 1e-5  # GGUF's numbers are float32

Metadata = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Description:
    """What a GGUF file says of a model.

    decoder: with its weights as the file has them. tensors: small ones that are part of it.
    """

    metadata: Metadata
    decoder: Decoder
    tensors: dict[str, NDArray[np.float32]]


def describe(architecture: str, decoder: Decoder) -> Description:
    """Metadata, without tokenizer, of a model; raises UnsupportedModel if GGUF cannot say it."""
    if architecture not in ARCHITECTURES or decoder.sees:
        known = ", ".join(sorted(ARCHITECTURES.keys() - {architecture}))
        raise UnsupportedModel(
            f"{architecture} cannot be written as GGUF; known: {known}. Write UQFF instead"
        )
    name = ARCHITECTURES[architecture]
    stored = as_stored(decoder, interleaved=name in INTERLEAVED)
    values, tensors = _values(name, decoder)
    metadata: Metadata = {"general.architecture": name}
    metadata |= {f"{name}.{key}": value for key, value in values.items()}
    found = Description(metadata, stored, tensors)
    _check(name, found)
    return found


def as_stored(decoder: Decoder, *, interleaved: bool) -> Decoder:
    """The decoder of weights whose norms have their 1, and whose q and k rows may be permuted."""

    def attention(a: Attention) -> Attention:
        norm = None if a.qk_norm is None else replace(a.qk_norm, unit_offset=False)
        rope = a.rope and replace(a.rope, interleaved=interleaved or a.rope.interleaved)
        return replace(a, qk_norm=norm, rope=rope)

    layers = tuple(
        replace(
            layer, attention=attention(layer.attention), norm=replace(layer.norm, unit_offset=False)
        )
        for layer in decoder.layers
    )
    return replace(decoder, layers=layers, norm=replace(decoder.norm, unit_offset=False))


def _values(name: str, d: Decoder) -> tuple[Metadata, dict[str, NDArray[np.float32]]]:
    first = d.layers[0].attention
    heads = [layer.attention for layer in d.layers]
    kind = "rms_" if d.norm.kind == "rms" else ""
    values: Metadata = {
        "context_length": d.context,
        "embedding_length": d.hidden,
        "block_count": len(d.layers),
        "feed_forward_length": _each([layer.feed_forward.width for layer in d.layers]),
        "attention.head_count": _each([a.heads for a in heads]),
        "attention.head_count_kv": _each([a.kv_heads for a in heads]),
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        f"attention.layer_norm_{kind}epsilon": d.norm.eps,
    }
    sizes = {a.window for a in heads if a.window is not None}
    if sizes:
        values["attention.sliding_window"] = max(sizes)
    if not math.isclose(first.scale, first.head_dim**-0.5, rel_tol=1e-6):
        values["attention.scale"] = first.scale
    if first.softcap is not None:
        values["attn_logit_softcapping"] = first.softcap
    if d.logit_softcap is not None:
        values["final_logit_softcapping"] = d.logit_softcap
    if name == "granite":
        values |= {"embedding_scale": d.embed_scale, "residual_scale": d.residual_scale}
        values["logit_scale"] = 1.0 / d.logit_scale
    values |= _experts(d)
    far = next((a.rope for a in heads if a.rope and a.window is None), first.rope)
    near = next((a.rope for a in heads if a.rope and a.window is not None), far)
    if far is None:
        return values, {}
    if near is not None and near.theta != far.theta:
        values["rope.freq_base_swa"] = near.theta
    scaling, tensors = _rope(far, d.context)
    return values | scaling, tensors


def _each(sizes: list[int]) -> int | NDArray[np.int32]:
    return sizes[0] if len(set(sizes)) == 1 else np.array(sizes, np.int32)


def _experts(d: Decoder) -> Metadata:
    moes = [layer.feed_forward for layer in d.layers if isinstance(layer.feed_forward, Moe)]
    if not moes:
        return {}
    moe = moes[0]
    values: Metadata = {
        "expert_count": moe.experts,
        "expert_used_count": moe.top_k,
        "expert_feed_forward_length": moe.width,
    }
    return values if moe.normalize else values | {"expert_weights_norm": False}


def _rope(rope: Rope, context: int) -> tuple[Metadata, dict[str, NDArray[np.float32]]]:
    values: Metadata = {"rope.dimension_count": rope.dims, "rope.freq_base": rope.theta}
    at = "rope.scaling."
    match rope.scaling:
        case None:
            return values, {}
        case spec.LinearScaling(factor):
            return values | {f"{at}type": "linear", f"{at}factor": factor}, {}
        case spec.Llama3Scaling():
            plain, _ = replace(rope, scaling=None).frequencies(context)
            scaled, _ = rope.frequencies(context)
            return values, {"rope_freqs.weight": np.divide(plain, scaled).astype(np.float32)}
        case spec.YarnScaling() as s:
            values |= {f"{at}type": "yarn", f"{at}factor": s.factor}
            values |= {f"{at}original_context_length": s.original_context}
            values |= {f"{at}yarn_beta_fast": s.beta_fast, f"{at}yarn_beta_slow": s.beta_slow}
            return values | {f"{at}yarn_attn_factor": rope.frequencies(context)[1]}, {}
        case spec.FactorScaling() as s if s.long_magnitude in (None, s.magnitude):
            values[f"{at}original_context_length"] = s.original_context
            values[f"{at}attn_factor"] = s.magnitude
            return values, {
                "rope_factors_short.weight": np.array(s.short, np.float32),
                "rope_factors_long.weight": np.array(s.long, np.float32),
            }
        case other:
            raise UnsupportedModel(
                f"rope scaling {type(other).__name__} cannot be written as GGUF; write UQFF instead"
            )


def _check(name: str, found: Description) -> None:
    """Read it back: what the recipe makes of it must be the same model."""
    shapes = {NAMING.name(role): shape for role, shape in roles(found.decoder).items()}
    empty = np.empty(0, np.uint8)
    tensors = {key: ByteTensor(key, "f32", shape, empty) for key, shape in shapes.items()}
    for key, value in found.tensors.items():
        tensors[key] = ByteTensor(key, "f32", value.shape, value.view(np.uint8))
    try:
        read = GgufFields(name, found.metadata, tensors)
        decoder = gguf.RECIPES[name](read)
        read.check_all_read()
    except SquallError as error:
        raise UnsupportedModel(f"the model cannot be written as GGUF: {error}") from None
    wanted, given = dict(_leaves("", found.decoder)), dict(_leaves("", decoder))
    differ = [
        key
        for key in wanted.keys() | given.keys()
        if key not in wanted or key not in given or not _same(wanted[key], given[key])
    ]
    if differ:
        names = sorted({re.sub(r"\[\d+\]", "", key) for key in differ})
        raise UnsupportedModel(
            f"the model cannot be written as GGUF, where its {', '.join(names[:4])} would be "
            "lost; write UQFF instead"
        )


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The values in a Spec, each with its path. Ropes are the same that turn the same way."""
    if isinstance(value, Rope):
        for context in (1, 1 << 30):
            frequencies, magnitude = value.frequencies(context)
            turns = (*frequencies, magnitude, value.interleaved)
            yield from _leaves(f"{name}[{context}]", turns)
    elif is_dataclass(value):
        for item in fields(value):
            yield from _leaves(f"{name}.{item.name}".lstrip("."), getattr(value, item.name))
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield from _leaves(f"{name}[{index}]", part)
    else:
        yield name, value


def _same(value: object, other: object) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=_TOLERANCE)
    return value == other
