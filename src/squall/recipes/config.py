"""One function per architecture of config.json: its values -> Decoder.

Weights are as transformers stores them: rope of halves unless said otherwise, and the norms of the
gemma family without their 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from squall.checkpoints.base import Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes import config_names as names
from squall.recipes import parts
from squall.recipes.config_fields import ConfigFields, by_model_type, keys_of
from squall.recipes.config_parts import (
    activation,
    attention,
    long_rope,
    long_rope_with_magnitudes,
    mlp,
    rope,
    sectioned,
    switched_windows,
    upper_layers,
    window,
    windows,
)
from squall.recipes.names import Naming
from squall.recipes.parts import decoder, depth, head_dim, hidden, layer_norm, rms
from squall.spec import Attention, Decoder, Rope, Wiring

RecipeFunction = Callable[[ConfigFields], Decoder]
F = TypeVar("F", bound=RecipeFunction)


@dataclass(frozen=True, slots=True)
class Entry:
    function: RecipeFunction
    naming: Naming


RECIPES: dict[str, Entry] = {}
NAMES: dict[str, str] = {}  # for people -> classes of transformers
# Models that see, and the kind of language model that they have if their files do not say.
SEERS: dict[str, str] = {}


def recipe(architecture: str, name: str, naming: Naming = names.USUAL) -> Callable[[F], F]:
    """Register a function for a value of `architectures`, and a name for people."""

    def register(function: F) -> F:
        RECIPES[architecture] = Entry(function, naming)
        NAMES[name] = architecture
        return function

    return register


def architecture(config: Mapping[str, object], chosen: str | None) -> str:
    """The architecture of a config.json, or the one that was chosen instead."""
    found = config.get("architectures") or [by_model_type(config.get("model_type"))]
    if chosen is not None:
        found = [NAMES.get(chosen, chosen)]
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        raise InvalidCheckpoint(
            f"architectures in config.json is {repr(found)[:99]}; it must be a list of one name, "
            f"or missing with a known model_type, which is {repr(config.get('model_type'))[:99]}"
        )
    if found[0] not in RECIPES and found[0] not in SEERS:
        known = ", ".join([*sorted({*RECIPES, *SEERS}), *sorted(NAMES)])
        raise UnsupportedModel(f"unknown architecture {quote(found[0])}; known: {known}")
    return found[0]


def text_architecture(config: Mapping[str, object], name: str) -> str:
    """The architecture of a model's language model; for most it is the model's own."""
    if name in RECIPES:
        return name
    inner = config.get("text_config")
    kind = (inner.get("model_type") if isinstance(inner, dict) else None) or SEERS[name]
    found = by_model_type(kind)
    if found not in RECIPES:
        raise UnsupportedModel(f"unknown kind of language model in text_config: {quote(str(kind))}")
    return found


def fields(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], architecture: str
) -> ConfigFields:
    """The values that the function of a language model reads."""
    name = text_architecture(config, architecture)
    entry, keys = RECIPES[name], keys_of(name)
    if architecture not in SEERS:
        return ConfigFields(config, tensors, keys, entry.naming)
    inner = config.get("text_config", config)  # early files have it at the top
    if not isinstance(inner, Mapping):
        raise InvalidCheckpoint("text_config in config.json is no object")
    if config.get("tie_word_embeddings") is True:
        inner = {**inner, "tie_word_embeddings": True}
    return ConfigFields(inner, tensors, keys, names.in_multimodal(entry.naming, tensors))


def check_depth(c: ConfigFields) -> None:
    """Raise InvalidCheckpoint when the last layer has no tensors, before all are described."""
    last = c.naming.layer.format(depth(c) - 1)
    if not any(name.startswith(last) for name in c.tensors):
        raise InvalidCheckpoint(
            f"num_hidden_layers is {depth(c)}, and the files have no tensor {last}*"
        )


@recipe("LlamaForCausalLM", "llama")
def llama(c: ConfigFields) -> Decoder:
    return decoder(c, rms(c), attention(c, rope(c)), mlp(c))


@recipe("MistralForCausalLM", "mistral")
def mistral(c: ConfigFields) -> Decoder:
    return decoder(c, rms(c), attention(c, rope(c), window=window(c)), mlp(c))


@recipe("MixtralForCausalLM", "mixtral", names.SPARSE_BLOCK)
def mixtral(c: ConfigFields) -> Decoder:
    heads = attention(c, rope(c), window=window(c))
    return decoder(c, rms(c), heads, parts.moe(c, activation(c), normalize=True))


@recipe("Qwen2ForCausalLM", "qwen2")
def qwen2(c: ConfigFields, turn: Rope | None = None) -> Decoder:
    sizes = switched_windows(c, upper_layers(c))
    heads = attention(c, turn or rope(c), window=sizes, qkv_bias=True, out_bias=False)
    return decoder(c, rms(c), heads, mlp(c))


@recipe("Qwen2VLForConditionalGeneration", "qwen2vl")
def qwen2_vl(c: ConfigFields) -> Decoder:
    return qwen2(c, sectioned(c, rope(c, scalings={"mrope": lambda _c, _at, _dims: None})))


RECIPES["Qwen2_5_VLForConditionalGeneration"] = RECIPES["Qwen2VLForConditionalGeneration"]


@recipe("Qwen3ForCausalLM", "qwen3")
def qwen3(c: ConfigFields) -> Decoder:
    sizes = switched_windows(c, upper_layers(c))
    return decoder(c, rms(c), attention(c, rope(c), window=sizes, qk_norm=rms(c)), mlp(c))


@recipe("Qwen3MoeForCausalLM", "qwen3moe")
def qwen3_moe(c: ConfigFields) -> Decoder:
    sizes = switched_windows(c, (True,) * depth(c))
    normalize = c.flag("norm_topk_prob", False)
    moe = parts.moe(c, activation(c), normalize=normalize)
    made = zip(dense_layers(c), mlp(c), moe, strict=True)
    feed_forward = [mlp if is_dense else experts for is_dense, mlp, experts in made]
    heads = attention(c, rope(c), window=sizes, qk_norm=rms(c))
    return decoder(c, rms(c), heads, feed_forward)


def dense_layers(c: ConfigFields) -> tuple[bool, ...]:
    """Which layers have an MLP among those with experts."""
    layers, step = depth(c), c.count("decoder_sparse_step", 1)
    only = c.indices("mlp_only_layers", below=layers)
    return tuple(i in only or (i + 1) % step != 0 for i in range(layers))


@recipe("PhiForCausalLM", "phi2", names.NUMBERED_MLP)
def phi(c: ConfigFields) -> Decoder:
    norm = layer_norm(c)
    head_norm = norm if c.flag("qk_layernorm", False) else None
    heads = attention(c, rope(c), qkv_bias=True, out_bias=True, qk_norm=head_norm)
    feed_forward = parts.mlp(c, activation(c), gated=False, bias=True)
    return decoder(c, norm, heads, feed_forward, wiring="parallel", head_bias=True)


@recipe("Phi3ForCausalLM", "phi3")
def phi3(c: ConfigFields) -> Decoder:
    # Early files call it su, or yarn.
    turn = rope(c, scalings={"su": long_rope, "yarn": long_rope})
    return decoder(c, rms(c), attention(c, turn, window=window(c)), mlp(c))


@recipe("PhiMoEForCausalLM", "phi3.5moe", names.SPARSE_BLOCK)
def phi_moe(c: ConfigFields) -> Decoder:
    turn = rope(c, scalings={"longrope": long_rope_with_magnitudes})
    norm = replace(rms(c), kind="layer", bias=True)  # for all that the key is called
    if c.count("num_experts_per_tok") != 2:
        raise UnsupportedModel("SparseMixer chooses 2 experts; num_experts_per_tok differs")
    jitter = c.number("router_jitter_noise", high=1.0)
    feed_forward = parts.moe(c, activation(c), normalize=False, jitter=jitter)
    head_bias = c.flag("lm_head_bias", False)
    heads = attention(c, turn, window=window(c))
    return decoder(c, norm, heads, feed_forward, head_bias=head_bias)


RECIPES["PhimoeForCausalLM"] = RECIPES["PhiMoEForCausalLM"]


@recipe("Starcoder2ForCausalLM", "starcoder2", names.CODE_MLP)
def starcoder2(c: ConfigFields) -> Decoder:
    bias = c.flag("use_bias", True)
    heads = attention(c, rope(c), window=window(c), qkv_bias=bias, out_bias=bias)
    feed_forward = parts.mlp(c, activation(c), gated=False, bias=bias)
    return decoder(c, layer_norm(c), heads, feed_forward)


@recipe("GemmaForCausalLM", "gemma")
def gemma(c: ConfigFields) -> Decoder:
    # The first files say "gelu" and mean its approximation.
    act = "gelu_tanh" if activation(c) == "gelu" else activation(c)
    norm, scale = replace(rms(c), unit_offset=True), hidden(c) ** 0.5
    feed_forward = parts.mlp(c, act, gated=True, bias=False)
    return decoder(c, norm, attention(c, rope(c)), feed_forward, embed_scale=scale)


@recipe("Gemma2ForCausalLM", "gemma2", names.POST_NORMS)
def gemma2(c: ConfigFields) -> Decoder:
    scale, cap = c.number("query_pre_attn_scalar") ** -0.5, c.optional("attn_logit_softcapping")
    sizes = windows(c, period=2)
    return sandwich(c, attention(c, rope(c), window=sizes, scale=scale, softcap=cap))


@recipe("Gemma3ForCausalLM", "gemma3", names.POST_NORMS)
def gemma3(c: ConfigFields) -> Decoder:
    sizes, scale = windows(c, period=6), c.number("query_pre_attn_scalar") ** -0.5
    far, near = rope(c, section="full_attention"), local_rope(c)
    turns = tuple(near if size else far for size in sizes)
    norm = replace(rms(c), unit_offset=True)
    return sandwich(c, attention(c, turns, window=sizes, scale=scale, qk_norm=norm))


RECIPES["Gemma3ForConditionalGeneration"] = RECIPES["Gemma3ForCausalLM"]


def sandwich(c: ConfigFields, heads: Sequence[Attention]) -> Decoder:
    return decoder(
        c,
        replace(rms(c), unit_offset=True),
        heads,
        mlp(c, "hidden_activation"),
        wiring="sandwich",
        embed_scale=hidden(c) ** 0.5,
        logit_softcap=c.optional("final_logit_softcapping"),
    )


def local_rope(c: ConfigFields) -> Rope:
    """The rope of layers with a window."""
    theta, section = "rope_local_base_freq", "sliding_attention"
    if c.has_section(f"rope_parameters.{section}"):
        return rope(c, theta=theta, section=section)
    return Rope(c.number(theta, low=1.0), head_dim(c))


@recipe("GraniteForCausalLM", "granite")
def granite(c: ConfigFields) -> Decoder:
    return decoder(
        c,
        rms(c),
        attention(c, rope(c), scale=c.number("attention_multiplier")),
        mlp(c),
        embed_scale=c.number("embedding_multiplier"),
        residual_scale=c.number("residual_multiplier"),
        logit_scale=1.0 / c.number("logits_scaling"),
    )


@recipe("Olmo2ForCausalLM", "olmo2", names.POST_NORMS)
def olmo2(c: ConfigFields) -> Decoder:
    heads = attention(c, rope(c), qk_norm=rms(c), qk_norm_scope="row")
    return decoder(c, rms(c), heads, mlp(c), wiring="post")


@recipe("CohereForCausalLM", "cohere")
def cohere(c: ConfigFields) -> Decoder:
    norm, turn = replace(layer_norm(c), bias=False), rope(c, interleaved=True)
    head_norm = norm if c.flag("use_qk_norm", False) else None
    heads = attention(c, turn, qk_norm=head_norm, qk_norm_scope="each_head")
    scale = c.number("logit_scale")
    return decoder(c, norm, heads, mlp(c), wiring="parallel", logit_scale=scale)


@recipe("Cohere2ForCausalLM", "cohere2")
def cohere2(c: ConfigFields) -> Decoder:
    norm, sizes = replace(layer_norm(c), bias=False), windows(c, period=4)
    turn, scale = rope(c, interleaved=True), c.number("logit_scale")
    turns = tuple(turn if size else None for size in sizes)
    heads = attention(c, turns, window=sizes)
    return decoder(c, norm, heads, mlp(c), wiring="parallel", logit_scale=scale)


@recipe("StableLmForCausalLM", "stablelm", names.NORM_PER_HEAD)
def stablelm(c: ConfigFields) -> Decoder:
    norm, bias = layer_norm(c), c.flag("use_qkv_bias", False)
    head_norm = replace(norm, bias=False) if c.flag("qk_layernorm", False) else None
    heads = attention(
        c, rope(c), qkv_bias=bias, out_bias=False, qk_norm=head_norm, qk_norm_scope="each_head"
    )
    wiring: Wiring = "parallel" if c.flag("use_parallel_residual", False) else "pre"
    return decoder(c, norm, heads, mlp(c), wiring=wiring)


@recipe("GlmForCausalLM", "glm")
def glm(c: ConfigFields, wiring: Wiring = "pre") -> Decoder:
    heads = attention(c, rope(c, interleaved=True), out_bias=False)
    return decoder(c, rms(c), heads, mlp(c), wiring=wiring)


@recipe("Glm4ForCausalLM", "glm4")
def glm4(c: ConfigFields) -> Decoder:
    return glm(c, "sandwich")


@recipe("SmolLM3ForCausalLM", "smollm3")
def smollm3(c: ConfigFields) -> Decoder:
    turn, layers = rope(c), depth(c)
    rotated = c.pattern("no_rope_layer_interval", 4, layers=layers)
    if c.has("no_rope_layers"):  # it marks those with rope
        rotated = c.pattern("no_rope_layers", 0, layers=layers)
    sizes = switched_windows(c, tuple(not mark for mark in rotated))
    turns = tuple(turn if mark else None for mark in rotated)
    return decoder(c, rms(c), attention(c, turns, window=sizes), mlp(c))
