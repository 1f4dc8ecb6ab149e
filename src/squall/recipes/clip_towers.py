"""Towers of CLIP's kind, and the models that have them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes import config_parts, parts
from squall.recipes.config_fields import ConfigFields
from squall.recipes.names import Naming
from squall.recipes.part import Part
from squall.recipes.vision import PartsFunction, Sections, seer
from squall.spec import Connector, Layer, Tower

CLIP_STEMS: Mapping[str, str] = {
    "patches": "embeddings.patch_embedding",
    "class": "embeddings.class_embedding",
    "positions": "embeddings.position_embedding",
    "pre_norm": "pre_layrnorm",
    "norm": "post_layernorm",
    "attention.norm": "layer_norm1",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "feed_forward.norm": "layer_norm2",
    "feed_forward.up": "mlp.fc1",
    "feed_forward.down": "mlp.fc2",
}
# Models of LLaVA's class with towers of another kind.
OTHERS: dict[str, PartsFunction] = {}
IN_LAYERS = ("attention.", "feed_forward.")


def naming(before: str, stems: Mapping[str, str], layer: str, harmless: str = r"(?!)") -> Naming:
    """Names that all begin with `before`."""
    made = {
        role: stem if role.startswith(IN_LAYERS) else before + stem for role, stem in stems.items()
    }
    return Naming(made, before + layer, harmless=re.compile(harmless))


def layers(v: ConfigFields, count: int) -> tuple[Layer, ...]:
    """`count` of CLIP's layers, with biases in all linears."""
    norm = parts.layer_norm(v)
    heads = config_parts.attention(v, None, qkv_bias=True, out_bias=True)
    mlp = parts.mlp(v, config_parts.activation(v), gated=False, bias=True)
    return tuple(Layer(*pair, norm) for pair in zip(heads, mlp, strict=True))[:count]


def side(v: ConfigFields) -> int:
    """Patches in a row of a square picture."""
    return v.count("image_size", high=1 << 14) // v.count("patch_size", high=1 << 10)


def tower(v: ConfigFields, before: str, read: int) -> Part:
    """A tower of CLIP of which `hidden_states[read]` is read, as transformers numbers them."""
    depth = parts.depth(v)
    count = read if read >= 0 else depth + 1 + read
    if not 0 <= count <= depth:
        raise InvalidCheckpoint(
            f"vision_feature_layer is {read}; it must be between -{depth + 1} and {depth}"
        )
    norm, pixels = parts.layer_norm(v), v.count("patch_size") ** 2 * v.count("num_channels")
    spec = Tower(
        pixels, parts.hidden(v), layers(v, count), class_token=True, positions=side(v) ** 2 + 1,
        pre_norm=norm,
    )  # fmt: skip
    unused = "|".join(str(i) for i in range(count, depth))
    harmless = rf"{re.escape(before)}(embeddings\.position_ids|post_layernorm\.\w+"
    harmless += rf"|encoder\.layers\.({unused})\..*)" if unused else ")"
    v.check_all_read()
    names = naming(before, CLIP_STEMS, "encoder.layers.{}.", harmless)
    return Part("tower", spec, names, prefix="tower.")


def projector(top: ConfigFields, tower: int, hidden: int, before: str, newlines: int = 0) -> Part:
    """Two linears with an activation between."""
    act = config_parts.activation(top, "projector_hidden_act")
    bias = top.flag("multimodal_projector_bias", True)
    spec = Connector(tower, (hidden, hidden), act, bias, newlines=newlines)
    stems = {
        "linear0": "multi_modal_projector.linear_1",
        "linear1": "multi_modal_projector.linear_2",
        "newline": "image_newline",
    }
    return Part("connector", spec, naming(before, stems, ""), prefix="connector.")


@seer("LlavaForConditionalGeneration", "llava", "llama")
def llava(s: Sections) -> tuple[Part, ...]:
    kind = s.kind("vision_config", "clip_vision_model")
    if kind in OTHERS:
        return OTHERS[kind](s)
    v, top = s.part("vision_config", "clip_vision_model"), s.top("llava")
    if kind != "clip_vision_model":
        raise UnsupportedModel("the tower of LLaVA must be CLIP's or Pixtral's")
    read = s.config.get("vision_feature_layer", -2)
    if not isinstance(read, int):
        raise UnsupportedModel("vision_feature_layer names several layers, or none")
    top.skip("vision_feature_layer", "vision_feature_select_strategy", "image_token_index")
    top.skip("image_seq_length")
    seen = tower(v, s.before("embeddings.class_embedding"), read)
    made = projector(
        top, parts.hidden(v), s.decoder.hidden, s.before("multi_modal_projector.linear_1")
    )
    top.check_all_read()
    return seen, made
