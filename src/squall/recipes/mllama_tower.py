"""Llama 3.2 Vision: pictures in tiles, and a language model that recalls them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from squall.errors import InvalidCheckpoint
from squall.files import quote
from squall.recipes import config_names, config_parts, parts
from squall.recipes.clip_towers import IN_LAYERS, naming, side
from squall.recipes.config import RECIPES, Entry
from squall.recipes.config_fields import ConfigFields
from squall.recipes.names import Part
from squall.recipes.vision import Sections, seer
from squall.spec import Connector, Decoder, Layer, Norm, Tiles, Tower

MLLAMA = "MllamaForConditionalGeneration"
# Embeddings after those of the vocabulary; the first of them is of <|image|>.
MORE_IDS = 8
_NAMES = config_names.USUAL.stems
_RECALL = {
    role.replace("attention", "recall"): stem.replace("self_attn", "cross_attn")
    for role, stem in _NAMES.items()
    if role.startswith("attention")
}
_STEMS = {
    "patches": "patch_embedding",
    "class": "class_embedding",
    "positions": "gated_positional_embedding.embedding",
    "pre_norm": "layernorm_pre",
    "norm": "layernorm_post",
    "tiles.before.positions": "pre_tile_positional_embedding.embedding",
    "tiles.places.positions": "gated_positional_embedding.tile_embedding",
    "tiles.after.positions": "post_tile_positional_embedding.embedding",
    **{role: stem for role, stem in _NAMES.items() if role.startswith(IN_LAYERS)},
    "feed_forward.up": "mlp.fc1",
    "feed_forward.down": "mlp.fc2",
}
_LATE = "global_transformer.layers."


def gate(c: ConfigFields, name: str) -> float:
    """What a learned gate lets through."""
    c.tensors_read.add(name)
    values = c.tensors[name].to_float32().reshape(-1) if name in c.tensors else np.empty(0)
    if len(values) != 1 or not math.isfinite(values[0]):
        raise InvalidCheckpoint(f"the tensor {quote(name)} must be there, with one number")
    return math.tanh(values[0])


def language(c: ConfigFields) -> Decoder:
    norm, key = parts.rms(c), "cross_attention_layers"
    recalling = c.indices(key, below=parts.depth(c)) if c.has(key) else range(3, parts.depth(c), 5)
    heads = list(config_parts.attention(c, config_parts.rope(c)))
    for i in recalling:
        heads[i] = replace(heads[i], rope=None, qk_norm=norm, recalls=True)
    c.skip("tie_word_embeddings", "dropout")
    mlp = config_parts.mlp(c)
    made = parts.decoder(c, norm, heads, mlp, tied=False, more_ids=MORE_IDS)
    layers = list(made.layers)
    for i in recalling:
        stem = f"{c.naming.layer.format(i)}cross_attn_"
        both = gate(c, f"{stem}attn_gate"), gate(c, f"{stem}mlp_gate")
        layers[i] = replace(layers[i], gates=both)
    return replace(made, layers=tuple(layers))


RECIPES[MLLAMA] = Entry(language, replace(config_names.USUAL, stems={**_NAMES, **_RECALL}))


@seer(MLLAMA, "vllama", "mllama")
def mllama(s: Sections) -> tuple[Part, ...]:
    v, top = s.part("vision_config", "mllama_vision_model"), s.top("mllama")
    outer = s.before("vision_model.patch_embedding")
    before = f"{outer}vision_model."
    tiles, norm = _tiles(s.text, v, before), Norm("layer", 1e-5, bias=True)
    pixels = v.count("patch_size") ** 2 * v.count("num_channels")
    tower = Tower(
        pixels, parts.hidden(v), (_layer(v),) * parts.depth(v), class_token=True,
        positions=side(v) ** 2 + 1, pre_norm=norm, norm=norm, tiles=tiles,
    )  # fmt: skip
    width = tower.hidden * (1 + len(tiles.read))
    if v.count("vision_output_dim") != width:
        raise InvalidCheckpoint(f"vision_output_dim is not {width}, which the layers make")
    top.skip("image_token_index")
    v.check_all_read()
    top.check_all_read()
    stems = _STEMS | {
        f"late.{i}.{role}": f"{_LATE}{i}.{stem}"
        for i in range(len(tiles.late))
        for role, stem in _STEMS.items()
        if role.startswith(IN_LAYERS)
    }
    connector = Connector(width, (s.decoder.hidden,), bias=True)
    linear = naming(outer, {"linear0": "multi_modal_projector"}, "")
    return (
        Part("tower", tower, naming(before, stems, "transformer.layers.{}.")),
        Part("connector", connector, linear),
    )


def _layer(v: ConfigFields) -> Layer:
    heads, *_ = config_parts.attention(v, None)
    mlp, *_ = parts.mlp(v, config_parts.activation(v), gated=False, bias=True)
    return Layer(heads, mlp, parts.layer_norm(v))


def _tiles(c: ConfigFields, v: ConfigFields, before: str) -> Tiles:
    table = c.tensors.get(f"{before}{_STEMS['tiles.before.positions']}.weight")
    v.skip("supported_aspect_ratios")  # the table tells how many
    late = [f"{before}{_LATE}{i}.gate_" for i in range(v.count("num_global_layers", high=4096))]
    stems = ("pre_tile", "gated", "post_tile")
    first, middle, last = (gate(c, f"{before}{n}_positional_embedding.gate") for n in stems)
    return Tiles(
        1 if table is None else table.shape[0],
        v.count("max_num_tiles", high=64),
        (first, middle, last),
        tuple(replace(_layer(v), gates=(gate(c, f"{n}attn"), gate(c, f"{n}ffn"))) for n in late),
        v.indices("intermediate_layers_indices", below=parts.depth(v)),
    )
