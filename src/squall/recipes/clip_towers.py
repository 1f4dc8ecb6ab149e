"""Towers of CLIP's kind, and the models that have them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes import config_parts, parts
from squall.recipes.config_fields import ConfigFields, part_keys
from squall.recipes.names import Naming, Part
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
CLIP = "clip_vision_model"
# Models of LLaVA's class with towers of another kind.
OTHERS: dict[str, PartsFunction] = {}
IN_LAYERS = ("attention.", "feed_forward.")


def naming(before: str, stems: Mapping[str, str], layer: str, harmless: str = r"(?!)") -> Naming:
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


def tower(v: ConfigFields, before: str, layer: object, *, class_token: bool = True) -> Part:
    """A tower of which `hidden_states[layer]` is read, as transformers numbers them, or several.

    class_token: it is of CLIP's kind, not of SigLIP's.
    """
    depth = parts.depth(v)
    given = layer if isinstance(layer, list) else [layer]
    numbers = [n for n in given if isinstance(n, int) and -depth - 1 <= n <= depth]
    if not numbers or numbers != given:
        raise InvalidCheckpoint(
            f"vision_feature_layer is {layer!r:.99}; it must be a number between -{depth + 1} and "
            f"{depth}, or a list of such"
        )
    read = tuple(n if n >= 0 else depth + 1 + n for n in numbers)
    count = max(read)
    spec = Tower(
        v.count("patch_size") ** 2 * v.count("num_channels"), parts.hidden(v), layers(v, count),
        bias=not class_token, class_token=class_token, positions=side(v) ** 2 + class_token,
        pre_norm=parts.layer_norm(v) if class_token else None, read=read if read[1:] else (),
    )  # fmt: skip
    unused = "|".join(str(i) for i in range(count, depth))
    harmless = rf"{re.escape(before)}(embeddings\.position_ids|(post_layernorm|head)\..*"
    harmless += rf"|encoder\.layers\.({unused})\..*)" if unused else ")"
    v.check_all_read()
    names = naming(before, CLIP_STEMS, "encoder.layers.{}.", harmless)
    return Part("tower", spec, names)


def projector(
    top: ConfigFields, tower: int, hidden: int, before: str, newlines: int = 0, scale: float = 1.0
) -> Part:
    """Two linears with an activation between."""
    act = config_parts.activation(top, "projector_hidden_act")
    bias = top.flag("multimodal_projector_bias", True)
    spec = Connector(tower, (hidden, hidden), act, bias, newlines=newlines, scale=scale)
    stems = {
        "norm": "multi_modal_projector.norm",
        "mix": "multi_modal_projector.patch_merger.merging_layer",
        "linear0": "multi_modal_projector.linear_1",
        "linear1": "multi_modal_projector.linear_2",
        "newline": "image_newline",
    }
    return Part("connector", spec, naming(before, stems, ""))


@seer("LlavaForConditionalGeneration", "llava", "llama")
def llava(s: Sections, architecture: str = "llava", newlines: int = 0) -> tuple[Part, ...]:
    kind = s.kind("vision_config", CLIP)
    if kind in OTHERS and not newlines:
        return OTHERS[kind](s)
    if kind not in (CLIP, "siglip_vision_model"):
        known = ", ".join([CLIP, "siglip_vision_model", *OTHERS])
        raise UnsupportedModel(f"vision_config is of the kind {quote(kind)}; known: {known}")
    v, top = s.part("vision_config", CLIP), s.top(architecture)
    layer = s.config.get("vision_feature_layer", -2)
    seen = tower(v, s.before("embeddings.patch_embedding"), layer, class_token=kind == CLIP)
    width = parts.hidden(v) * len(layer if isinstance(layer, list) else [layer])
    before = s.before("multi_modal_projector.linear_1")
    scaled = s.kind("text_config", "llama") == "granite"  # images, as tokens are
    scale = s.decoder.embed_scale if scaled else 1.0
    made = projector(top, width, s.decoder.hidden, before, newlines, scale)
    top.skip("vision_feature_layer", "vision_feature_select_strategy", "image_grid_pinpoints")
    top.skip("image_token_index", "image_seq_length")
    top.check_all_read()
    return seen, made


@seer("LlavaNextForConditionalGeneration", "llava_next", "llama")
def llava_next(s: Sections) -> tuple[Part, ...]:
    return llava(s, "llava_next", newlines=1)


# What a Phi 3 that sees must say, and what it is taken for where it does not.
PHI3V = {
    "img_processor": {
        "name": CLIP, "num_img_tokens": 144, "layer_idx": -2, "type_feature": "patch",
    },
    "embd_layer": {
        "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
        "use_hd_transform": True, "with_learnable_separator": True,
    },
}  # fmt: skip


@seer("Phi3VForCausalLM", "phi3v", "phi3")
def phi3v(s: Sections) -> tuple[Part, ...]:
    """CLIP's sizes are those of its tensors: config.json has its name alone."""
    for section, wanted in PHI3V.items():
        found = s.config.get(section)
        said = wanted | (found if isinstance(found, dict) else {})
        for key, value in wanted.items():
            if said[key] != value:
                raise UnsupportedModel(
                    f"{section}.{key} is {said[key]!r:.99}; only {value!r} is known"
                )
        s.text.ignored = [key for key in s.text.ignored if key != section]
    own = "model.vision_embed_tokens."
    before = f"{own}img_processor.vision_model."
    v = clip_fields(s, before)
    hidden, merged = s.decoder.hidden, 4
    spec = Connector(
        parts.hidden(v), (hidden, hidden), "gelu", True, merge=merged, newlines=2, early=True
    )
    stems = {"linear0": "img_projection.0", "linear1": "img_projection.2", "newline": "glb_GN"}
    names = replace(
        naming(own, stems, "", rf"{re.escape(own)}wte\.weight"),
        rows={"newline": (f"{own}glb_GN", f"{own}sub_GN")},
    )
    return tower(v, before, -2), Part("connector", spec, names)


def clip_fields(s: Sections, before: str) -> ConfigFields:
    """What the tensors of a tower of CLIP tell of it; its heads have 64 elements."""

    def shape(stem: str, dims: int) -> tuple[int, ...]:
        name = f"{before}{stem}.weight"
        found = s.text.tensors[name].shape if name in s.text.tensors else ()
        if len(found) != dims:
            raise InvalidCheckpoint(f"the tensor {name} is missing, or has shape {found}")
        return found

    hidden, channels, size, _ = shape("embeddings.patch_embedding", 4)
    lines = math.isqrt(max(shape("embeddings.position_embedding", 2)[0] - 1, 0))
    depth = 0
    while f"{before}encoder.layers.{depth}.mlp.fc1.weight" in s.text.tensors:
        depth += 1
    config = {
        "hidden_size": hidden, "num_attention_heads": hidden // 64, "num_channels": channels,
        "patch_size": size, "image_size": lines * size, "num_hidden_layers": depth,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1", 2)[0],
    }  # fmt: skip
    keys = part_keys(CLIP)
    assert keys is not None
    return ConfigFields(config, s.text.tensors, keys, s.text.naming)
