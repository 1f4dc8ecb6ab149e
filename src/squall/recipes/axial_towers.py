"""Towers whose patches turn with their line and column, and the models that have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes import config_parts, parts
from squall.recipes.clip_towers import OTHERS, naming, projector
from squall.recipes.config_fields import ConfigFields
from squall.recipes.names import Part
from squall.recipes.vision import Sections, seer
from squall.spec import Connector, Layer, Mlp, Norm, Rope, Tower

QWEN_STEMS: Mapping[str, str] = {
    "patches": "patch_embed.proj",
    "attention.norm": "norm1",
    **{f"attention.{role}": f"attn.{role}" for role in ("q", "k", "v")},
    "attention.out": "attn.proj",
    "feed_forward.norm": "norm2",
}
QWEN_FUSED = {"attn.qkv": ("attention.q", "attention.k", "attention.v")}
PLAIN_MLP = {"feed_forward.up": "mlp.fc1", "feed_forward.down": "mlp.fc2"}
GATED_MLP = {f"feed_forward.{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")}
MERGER_STEMS = {"norm": "merger.ln_q", "linear0": "merger.mlp.0", "linear1": "merger.mlp.2"}
PIXTRAL_STEMS: Mapping[str, str] = {
    "patches": "patch_conv",
    "pre_norm": "ln_pre",
    "attention.norm": "attention_norm",
    **{f"attention.{role}": f"attention.{role}_proj" for role in ("q", "k", "v")},
    "attention.out": "attention.o_proj",
    "feed_forward.norm": "ffn_norm",
    **{f"feed_forward.{role}": f"feed_forward.{role}_proj" for role in ("gate", "up", "down")},
}


def axial(v: ConfigFields, *, shared: bool) -> Rope:
    """The rotary embedding of config.json, see `turned`."""
    scalings = {"axial": lambda _v, _at, _dims: None}
    return turned(config_parts.rope(v, scalings=scalings), shared=shared)


def turned(turn: Rope, *, shared: bool) -> Rope:
    """Half of the frequencies turn with the line, half with the column.

    shared: both have the same, every other one; else they take turns.
    """
    if turn.dims % 4:
        raise InvalidCheckpoint(f"{turn.dims} elements of a head cannot turn with two axes")
    half = turn.dims // 4
    lines, columns = range(0, 2 * half, 2), range(0 if shared else 1, 2 * half, 2)
    return replace(turn, axes=(0,) * half + (1,) * half, order=(*lines, *columns))


def layers(
    v: ConfigFields, rope: Rope, mlp: tuple[Mlp, ...], norm: Norm, *, bias: bool
) -> tuple[Layer, ...]:
    heads = config_parts.attention(v, rope, qkv_bias=bias, out_bias=bias)
    return tuple(Layer(*pair, norm) for pair in zip(heads, mlp, strict=True))


def qwen(
    s: Sections, v: ConfigFields, made: tuple[Layer, ...], mlp: Mapping[str, str], out: str
) -> tuple[Part, ...]:
    """The tower and its merger. mlp: names. out: the key of the width of their rows."""
    hidden, frames = parts.hidden(v), v.count("temporal_patch_size", high=16)
    pixels = v.count("patch_size", high=1 << 10) ** 2 * v.count("in_channels", high=16)
    merge, width = v.count("spatial_merge_size", high=16) ** 2, v.count(out)
    if width != s.decoder.hidden:
        raise InvalidCheckpoint(f"{out} is {width}; it must be {s.decoder.hidden}")
    local: frozenset[int] = frozenset()
    if v.has("window_size"):
        local = frozenset(range(len(made)))
        local -= {*v.indices("fullatt_block_indexes", below=len(made))}
        v.count("window_size")  # of processors
        v.skip("tokens_per_second")
    v.check_all_read()
    tower = Tower(frames * pixels, hidden, made, local=local)
    widths, norm = (merge * hidden, width), made[0].norm
    merger = Connector(hidden, widths, "gelu", bias=True, norm=norm, merge=merge)
    before = s.before("patch_embed.proj")
    names = replace(naming(before, {**QWEN_STEMS, **mlp}, "blocks.{}."), fused=QWEN_FUSED)
    return (
        Part("tower", tower, names),
        Part("connector", merger, naming(before, MERGER_STEMS, "")),
    )


@seer("Qwen2VLForConditionalGeneration", "qwen2vl", "qwen2_vl")
def qwen2_vl(s: Sections) -> tuple[Part, ...]:
    v = s.part("vision_config", "qwen2_vl_vision")
    width = v.count("mlp_ratio", high=1 << 10) * parts.hidden(v)
    mlp = (Mlp(width, config_parts.activation(v), gated=False, bias=True),) * parts.depth(v)
    made = layers(v, axial(v, shared=True), mlp, Norm("layer", 1e-6, bias=True), bias=True)
    return qwen(s, v, made, PLAIN_MLP, "hidden_size")


@seer("Qwen2_5_VLForConditionalGeneration", "qwen2.5vl", "qwen2_5_vl")
def qwen2_5_vl(s: Sections) -> tuple[Part, ...]:
    v = s.part("vision_config", "qwen2_5_vl_vision")
    mlp = parts.mlp(v, config_parts.activation(v), gated=True, bias=True)
    made = layers(v, axial(v, shared=True), mlp, Norm("rms", 1e-6), bias=True)
    return qwen(s, v, made, GATED_MLP, "out_hidden_size")


def pixtral(s: Sections, top: ConfigFields, *, read: int, **fields: Any) -> tuple[Part, ...]:
    """The tower, and LLaVA's connector, which has these fields too.

    read: the layer that is, if config.json does not say.
    """
    v = s.part("vision_config", "pixtral")
    if s.config.get("vision_feature_layer", read) != -1:
        raise UnsupportedModel("vision_feature_layer of Pixtral's tower must be -1")
    norm = Norm("rms", 1e-5)
    pixels = v.count("patch_size", high=1 << 10) ** 2 * v.count("num_channels", high=16)
    mlp = parts.mlp(v, config_parts.activation(v), gated=True, bias=False)
    made = layers(v, axial(v, shared=False), mlp, norm, bias=False)
    spec = Tower(pixels, parts.hidden(v), made, pre_norm=norm)
    names = naming(s.before("patch_conv"), PIXTRAL_STEMS, "transformer.layers.{}.")
    before = s.before("multi_modal_projector.linear_1")
    connector = projector(top, spec.hidden, s.decoder.hidden, before)
    v.skip("image_size")
    top.skip("vision_feature_layer", "image_token_index", "image_seq_length")
    v.check_all_read()
    top.check_all_read()
    tower = Part("tower", spec, names)
    return tower, replace(connector, spec=replace(connector.spec, **fields))


@seer("Mistral3ForConditionalGeneration", "mistral3", "mistral")
def mistral3(s: Sections) -> tuple[Part, ...]:
    top, norm = s.top("mistral3"), Norm("rms", s.decoder.norm.eps)
    merge = top.count("spatial_merge_size", high=16) ** 2
    return pixtral(s, top, read=-1, norm=norm, merge=merge, mix=True)


def llava(s: Sections) -> tuple[Part, ...]:
    top = s.top("llava")
    if top.word("vision_feature_select_strategy") != "full":
        raise UnsupportedModel("vision_feature_select_strategy of Pixtral's tower must be full")
    return pixtral(s, top, read=-2)


OTHERS["pixtral"] = llava
