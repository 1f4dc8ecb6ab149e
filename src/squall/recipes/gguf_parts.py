"""GGUF metadata -> parts of a Spec. Which biases there are, the tensors tell."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from squall import spec
from squall.checkpoints.base import Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes import parts
from squall.recipes.fields import NEUTRAL, Fields
from squall.recipes.names import Naming
from squall.recipes.parts import Each, context, depth, head_dim
from squall.spec import Activation, Attention, Mlp, Moe, Rope

HARMLESS = frozenset(
    {
        "attention.layer_norm_epsilon",  # each recipe reads the epsilon of its own kind of norm
        "attention.layer_norm_rms_epsilon",
        "mm.tokens_per_image",  # of a vision tower that is not in this file
        "rope.scaling.finetuned",
        "tensor_data_layout",  # a remark of early converters
        "vocab_size",  # the embedding table has the true size
    }
)
NAMESPACES = {"general", "tokenizer", "split", "quantize", "imatrix"}  # for others than recipes
NEUTRAL_BY_KEY: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.output_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
}


class GgufFields(Fields):
    """The metadata of one architecture, without its prefix."""

    def __init__(
        self, architecture: str, metadata: Mapping[str, object], tensors: Mapping[str, Tensor]
    ) -> None:
        prefix = f"{architecture}."
        keys = [key for key in metadata if key.startswith(prefix)]
        super().__init__({key.removeprefix(prefix): metadata[key] for key in keys}, tensors)
        self._prefix = prefix
        known = {architecture, *NAMESPACES}
        self.ignored += [key for key in metadata if key.split(".")[0] not in known]

    def shown(self, key: str) -> str:
        return self._prefix + key

    def head(self) -> dict[str, Any]:
        if "token_embd.weight" not in self.tensors:
            raise InvalidCheckpoint("the tensor 'token_embd.weight' is missing")
        return {
            "vocab": self.tensors["token_embd.weight"].shape[0],
            "tied": "output.weight" not in self.tensors,
            "head_bias": "output.bias" in self.tensors,
            "logit_softcap": self.optional("final_logit_softcapping"),
        }

    def _is_harmless(self, key: str, value: object) -> bool:
        neutral = NEUTRAL_BY_KEY.get(key, NEUTRAL)
        return key in HARMLESS or (isinstance(value, int | float | str) and value in neutral)


def rope(
    c: Fields, *, interleaved: bool = False, scaled: bool = True, theta: float | None = None
) -> Rope:
    """The rotary embedding; `theta` and `scaled` are for layers that differ from the others."""
    size = head_dim(c)
    dims = c.count("rope.dimension_count", size, high=size)
    if dims % 2:
        raise InvalidCheckpoint(f"{c.shown('rope.dimension_count')} is {dims}; it must be even")
    base = c.number("rope.freq_base", 10000.0, low=1.0, high=1e15) if theta is None else theta
    return Rope(base, dims, interleaved, scaling(c, dims) if scaled else None)


def sectioned(c: Fields, rope: Rope) -> Rope:
    """The rotary embedding of positions with axes: how many frequencies turn with each."""
    sizes = c.indices("rope.dimension_sections", below=rope.dims + 1)
    if sum(sizes) != rope.dims // 2:
        key = c.shown("rope.dimension_sections")
        raise InvalidCheckpoint(f"{key} is {list(sizes)}; its sum must be {rope.dims // 2}")
    return replace(rope, axes=tuple(axis for axis, size in enumerate(sizes) for _ in range(size)))


def scaling(c: Fields, dims: int) -> spec.RopeScaling | None:
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


def _factors(c: Fields, dims: int) -> spec.FactorScaling | None:
    original, magnitude = _original_context(c), _magnitude(c)
    same = c.factors("rope_freqs.weight", dims // 2)
    short = c.factors("rope_factors_short.weight", dims // 2)
    long = c.factors("rope_factors_long.weight", dims // 2)
    if same is not None and short is None and long is None:
        return spec.FactorScaling(same, same, original, magnitude)
    if same is None and short is not None and long is not None:
        return spec.FactorScaling(short, long, original, magnitude)
    if same is short is long is None:
        return None
    raise InvalidCheckpoint("the rope factor tensors are incomplete: 'short' and 'long' are needed")


def _yarn(c: Fields, factor: float) -> spec.YarnScaling:
    extrapolation = c.number("rope.scaling.yarn_ext_factor", 1.0)
    if extrapolation != 1.0:
        raise UnsupportedModel(
            f"YaRN with yarn_ext_factor {extrapolation:g} is not supported; only 1 is"
        )
    base = spec.YarnScaling(
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


SCALINGS: Mapping[str, Callable[[Fields, float], spec.RopeScaling | None]] = {
    "none": lambda _c, _factor: None,
    "linear": lambda _c, factor: spec.LinearScaling(factor) if factor != 1.0 else None,
    "yarn": _yarn,
}


def windows(c: Fields, *, period: int = 0, default: int | None = None) -> tuple[int | None, ...]:
    """The attention window of each layer; all but every `period`-th have one (0: all have)."""
    layers = depth(c)
    key = "attention.sliding_window"
    size = c.optional_count(key) if c.has(key) else default
    marks = c.pattern("attention.sliding_window_pattern", period, layers=layers)
    return tuple(size if mark else None for mark in marks)


def attention(c: Fields, rope: Each[Rope | None], **fields: Each[Any]) -> tuple[Attention, ...]:
    own = {
        "scale": c.optional("attention.scale") or head_dim(c) ** -0.5,
        "qkv_bias": _have_bias(c, "attn_q", "attn_k", "attn_v", "attn_qkv"),
        "out_bias": _have_bias(c, "attn_output"),
    }
    return parts.attention(c, rope, **(own | fields))


def mlp(c: Fields, activation: Activation, *, gated: bool = True) -> tuple[Mlp, ...]:
    return parts.mlp(c, activation, gated=gated, bias=_have_bias(c, "ffn_down"))


def mlp_or_moe(c: Fields, activation: Activation) -> Sequence[Mlp | Moe]:
    """A mixture of experts where the metadata counts experts, else a gated MLP."""
    if c.optional_count("expert_count") is None:
        c.optional_count("expert_used_count")
        return mlp(c, activation)
    return parts.moe(c, activation, normalize=c.flag("expert_weights_norm", True))


def _have_bias(c: Fields, *stems: str) -> tuple[bool, ...]:
    return tuple(
        any(f"blk.{layer}.{stem}.bias" in c.tensors for stem in stems) for layer in range(depth(c))
    )


NAMING = Naming(
    stems={
        "embed": "token_embd",
        "norm": "output_norm",
        "head": "output",
        "attention.norm": "attn_norm",
        "attention.q": "attn_q",
        "attention.k": "attn_k",
        "attention.v": "attn_v",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "attention.out": "attn_output",
        "attention.post_norm": "post_attention_norm",
        "feed_forward.norm": "ffn_norm",
        "feed_forward.gate": "ffn_gate",
        "feed_forward.up": "ffn_up",
        "feed_forward.down": "ffn_down",
        "feed_forward.router": "ffn_gate_inp",
        "feed_forward.experts.gate": "ffn_gate_exps",
        "feed_forward.experts.up": "ffn_up_exps",
        "feed_forward.experts.down": "ffn_down_exps",
        "feed_forward.post_norm": "post_ffw_norm",
    },
    layer="blk.{}.",
    pieces={  # as early Mixtral files have them
        "feed_forward.experts.gate": "ffn_gate.{}",
        "feed_forward.experts.up": "ffn_up.{}",
        "feed_forward.experts.down": "ffn_down.{}",
    },
    fused={
        "attn_qkv": ("attention.q", "attention.k", "attention.v"),
        "ffn_up": ("feed_forward.gate", "feed_forward.up"),
    },
    harmless=re.compile(r"blk\.\d+\.attn_rot_embd(\.\w+)?"),  # rope tables of early converters
)
