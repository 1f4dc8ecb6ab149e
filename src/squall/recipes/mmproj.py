"""Towers of models in GGUF: `mmproj` files, as llama.cpp's converters lay them out.

There the norm weights of Gemma 3 have their 1 added already, Pixtral's q and k rows are permuted
for interleaved rope, Qwen's patches have one tensor a frame, and early files have the names of an
MLP's linears swapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Checkpoint, Deferred
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes import parts
from squall.recipes.axial_towers import turned
from squall.recipes.gguf_parts import GgufFields
from squall.recipes.names import Naming, locate
from squall.recipes.part import Part
from squall.roles import roles
from squall.spec import Activation, Connector, Decoder, Layer, Mlp, Norm, Rope, Tower

SOURCE = "mmproj"
STEMS: Mapping[str, str] = {
    "patches": "v.patch_embd",
    "class": "v.class_embd",
    "positions": "v.position_embd",
    "pre_norm": "v.pre_ln",
    "norm": "v.post_ln",
    "attention.norm": "ln1",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_out",
    "feed_forward.norm": "ln2",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}
LAYER, BREAK = "v.blk.{}.", "v.token_embd.img_break"
FUSED = {"attn_qkv": ("attention.q", "attention.k", "attention.v")}
SWAPPED = {"feed_forward.up": "ffn_down", "feed_forward.down": "ffn_up"}
TWO_LINEARS = {"linear0": "mm.0", "linear1": "mm.2"}


@dataclass(frozen=True, slots=True)
class Projector:
    """A kind of connector, and of the pictures that go with it.

    seer: the class of transformers whose processor reads them. stems: of its weights, by role.
    merge: the key of how many patches in a row become one, and the default; 0: the file must say.
    sizes: what preprocessor_config.json calls the pixels of a picture's edge.
    turns: whether lines and columns have the same frequencies; None: positions are learned.
    """

    seer: str
    stems: Mapping[str, str]
    merge: tuple[str, int] | None = None
    mean: bool = False
    sizes: tuple[str, ...] = ()
    turns: bool | None = None


_SCALE, _MERGE = "projector.scale_factor", "spatial_merge_size"
PROJECTORS: Mapping[str, Projector] = {
    "mlp": Projector(
        "LlavaForConditionalGeneration",
        {**TWO_LINEARS, "newline": "model.image_newline"},
        sizes=("shortest_edge",),
    ),
    "qwen2vl_merger": Projector(
        "Qwen2VLForConditionalGeneration", TWO_LINEARS, (_MERGE, 2), turns=True
    ),
    "qwen2.5vl_merger": Projector(
        "Qwen2_5_VLForConditionalGeneration", TWO_LINEARS, (_MERGE, 2), turns=True
    ),
    "gemma3": Projector(
        "Gemma3ForConditionalGeneration",
        {"norm": "mm.soft_emb_norm", "linear0": "mm.input_projection"},
        (_SCALE, 4),
        mean=True,
        sizes=("height", "width"),
    ),
    "idefics3": Projector(
        "Idefics3ForConditionalGeneration",
        {"linear0": "mm.model.fc"},
        (_SCALE, 0),
        sizes=("longest_edge",),
    ),
    "pixtral": Projector(
        "Mistral3ForConditionalGeneration",
        {"norm": "mm.input_norm", "mix": "mm.patch_merger", "linear0": "mm.1", "linear1": "mm.2"},
        (_MERGE, 1),
        sizes=("longest_edge",),
        turns=False,
    ),
}
# Of pictures, which `described` reads; and what the tensors tell, or transformers' processors.
_PICTURES = "image_mean image_std image_min_pixels image_max_pixels preproc_image_size"
_TOLD = "feed_forward_length projection_dim image_crop_resolution image_aspect_ratio"
_TOLD += " image_split_resolution mm_patch_merge_type mm_projector_type image_grid_pinpoints"
_ALSO = "has_vision_encoder has_text_encoder has_audio_encoder has_llava_projector"
_ALSO += " has_qwen2vl_merger"


class _File:
    """What the metadata says, and the tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        metadata, self.tensors = checkpoint.metadata, checkpoint.tensors
        if str(metadata.get("general.architecture")) != "clip":
            raise InvalidCheckpoint(f"{quote(checkpoint.path.name)} is no mmproj file")
        inner = {k: v for k, v in metadata.items() if k.startswith("clip.vision.")}
        outer = {k: v for k, v in metadata.items() if k.startswith("clip.") and k not in inner}
        self.top = GgufFields("clip", outer, self.tensors)
        self.vision = v = GgufFields("clip.vision", inner, self.tensors)
        v.ignored.clear()
        self.kind = kind = v.word("projector_type", self.top.word("projector_type", "mlp"))
        if kind not in PROJECTORS:
            known = ", ".join(PROJECTORS)
            raise UnsupportedModel(f"an mmproj file of the kind {quote(kind)}; known: {known}")
        self.projector = PROJECTORS[kind]
        self.patch = v.count("patch_size", high=1 << 10)
        self.image = v.count("image_size", high=1 << 14)
        self.side = self.image // self.patch
        key, default = self.projector.merge or ("", 0)
        self.merge = v.count(key, default or None, high=64) if key else 1
        if self.projector.turns is None and (self.side % self.merge or not self.side):
            raise InvalidCheckpoint(
                f"{self.image} pixels are no squares of {self.merge} patches of {self.patch}"
            )
        self.siglip = self.has("v.position_embd.weight") and not self.has("v.class_embd")

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """Of a matrix."""
        found = self.tensors[name].shape if name in self.tensors else ()
        if len(found) != 2:
            raise InvalidCheckpoint(f"the tensor {name} is missing, or no matrix")
        return found[0], found[1]

    def norm(self, eps: float | None = None) -> Norm:
        """Of the tower's kind."""
        own = self.vision.number("attention.layer_norm_epsilon", low=1e-15, high=1.0)
        bias = self.has("v.blk.0.ln1.bias")
        return Norm("layer" if bias else "rms", eps or own, bias=bias)

    def activation(self) -> Activation:
        named, silu = self.top.flag("use_gelu", False), self.top.flag("use_silu", False)
        if silu:
            return "silu"
        if self.siglip:
            return "gelu_tanh"
        return "gelu" if named else "quick_gelu"


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """The file with one tensor of patches: a picture is two frames that are the same."""
    name, tensors = "v.patch_embd.weight", checkpoint.tensors
    pair = [tensors[key] for key in (name, f"{name}.1") if key in tensors]
    if len(pair) < 2:
        return checkpoint
    if pair[0].shape != pair[1].shape:
        raise InvalidCheckpoint(f"{name} and {name}.1 differ in shape")

    def both() -> NDArray[np.uint8]:
        return (pair[0].to_float32() + pair[1].to_float32()).reshape(-1).view(np.uint8)

    rest = {key: tensor for key, tensor in tensors.items() if key != f"{name}.1"}
    return replace(checkpoint, tensors=rest | {name: Deferred(name, "f32", pair[0].shape, both)})


def add(decoder: Decoder, checkpoint: Checkpoint) -> tuple[Part, ...]:
    """Tower and connector of an `opened` file, for this decoder."""
    f = _File(checkpoint)
    made = _tower(f), _connector(f, decoder)
    f.vision.skip(*_PICTURES.split(), *_TOLD.split(), "window_size")
    f.top.skip(*_ALSO.split())
    f.vision.check_all_read()
    f.top.check_all_read()
    wanted = [(roles(part.spec), part.naming) for part in made]
    placed = []
    for part, found in zip(made, locate(wanted, f.tensors, read={BREAK}), strict=True):
        names = {
            part.prefix + role: tuple(replace(place, source=SOURCE) for place in places)
            for role, places in found.items()
        }
        placed.append(replace(part, names=names))
    return tuple(placed)


def _tower(f: _File) -> Part:
    v, norm, turns = f.vision, f.norm(), f.projector.turns
    depth, hidden, size = parts.depth(v), parts.hidden(v), parts.head_dim(v)
    rope, local = None, frozenset[int]()
    if turns is not None:
        rope = turned(Rope(10000.0, size, interleaved=f.kind == "pixtral"), shared=turns)
    if f.kind == "qwen2.5vl_merger":
        period = v.count("n_wa_pattern", high=4096)
        local = frozenset(i for i in range(depth) if (i + 1) % period)
    first = LAYER.format(0)
    bias = {
        "qkv_bias": f.has(f"{first}attn_q.bias") or f.has(f"{first}attn_qkv.bias"),
        "out_bias": f.has(f"{first}attn_out.bias"),
    }
    swapped = f.shape(f"{first}ffn_down.weight")[1] == hidden
    stems = {**STEMS, **(SWAPPED if swapped else {})}
    gated, act = f.has(f"{first}ffn_gate.weight"), f.activation()
    mlp_bias = f.has(f"{first}ffn_up.bias")
    layers = []
    for i, heads in enumerate(parts.attention(v, rope, **bias)):
        width = f.shape(f"{LAYER.format(i)}{stems['feed_forward.up']}.weight")[0]
        layers.append(Layer(heads, Mlp(width, act, gated, mlp_bias), norm))
    token, read = f.has("v.class_embd"), _read(f, depth)
    spec = Tower(
        3 * f.patch**2, hidden, tuple(layers), bias=f.siglip, class_token=token,
        positions=f.side**2 + token if token or f.siglip else 0,
        pre_norm=norm if token or f.kind == "pixtral" else None,
        norm=norm if f.kind not in ("mlp", "pixtral") else None,
        local=local, read=() if read == (depth,) else read,
    )  # fmt: skip
    return Part("tower", spec, Naming(stems, LAYER, fused=FUSED), prefix="tower.")


def _read(f: _File, depth: int) -> tuple[int, ...]:
    """After how many layers rows are read; files have no layers beyond."""
    return f.vision.indices("feature_layer", below=depth + 1) or (depth,)


def _connector(f: _File, decoder: Decoder) -> Part:
    stems, depth = f.projector.stems, parts.depth(f.vision)
    linears = [stem for role, stem in stems.items() if role.startswith("linear")]
    shapes = [f.shape(f"{stem}.weight") for stem in linears]
    width = shapes[-1][f.kind == "gemma3"]
    if width != decoder.hidden:
        raise InvalidCheckpoint(
            f"the mmproj file makes rows of {width} values, and this model's have "
            f"{decoder.hidden}: it belongs to another model"
        )
    normed = "norm" in stems and f.has(f"{stems['norm']}.weight")
    eps = decoder.norm.eps if f.kind == "pixtral" else None
    spec = Connector(
        parts.hidden(f.vision) * len(_read(f, depth)), (shapes[0][0], width)[-len(linears) :],
        "gelu" if len(linears) > 1 else None, bias=f.has(f"{linears[0]}.bias"),
        norm=replace(f.norm(eps), kind="rms", bias=False) if normed else None,
        merge=f.merge**2, mean=f.projector.mean, mix="mix" in stems and normed,
        newlines=int(_newline(f)),
    )  # fmt: skip
    turned = frozenset({"linear0"} if f.kind == "gemma3" else ())
    if f.kind == "gemma3":
        _check_windows(f, decoder)
    return Part("connector", spec, Naming(stems, "", transposed=turned), prefix="connector.")


def _newline(f: _File) -> bool:
    """Whether pictures are in tiles, and each line of one ends with a learned row."""
    pinned = f.vision.has("image_grid_pinpoints")
    return f.kind == "mlp" and (pinned or f.has(f.projector.stems["newline"]))


def _check_windows(f: _File, decoder: Decoder) -> None:
    tokens = (f.side // f.merge) ** 2
    if any((layer.attention.window or tokens) < tokens for layer in decoder.layers):
        raise UnsupportedModel(f"an image's {tokens} tokens must fit into the sliding window")


def described(checkpoint: Checkpoint) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A class of transformers, and what its config.json and preprocessor_config.json would say."""
    f = _File(checkpoint)
    v, seer, size = f.vision, f.projector.seer, f.image
    vision = {
        "model_type": "siglip_vision_model" if f.siglip else "clip_vision_model",
        "image_size": size, "patch_size": f.patch, "temporal_patch_size": 1,
        "spatial_merge_size": f.merge, "window_size": v.count("window_size", 112),
    }  # fmt: skip
    config: dict[str, Any] = {
        "vision_config": vision, "scale_factor": f.merge, "spatial_merge_size": f.merge,
        "mm_tokens_per_image": (f.side // f.merge) ** 2,
        "vision_feature_select_strategy": "full" if f.siglip else "default",
    }  # fmt: skip
    longest = size
    if f.kind == "idefics3":
        longest = v.count("preproc_image_size", 4 * size, high=1 << 16)
    processor: dict[str, Any] = {
        "image_mean": v.numbers("image_mean", 3), "image_std": v.numbers("image_std", 3),
        "size": dict.fromkeys(f.projector.sizes, longest),
        "crop_size": {"height": size, "width": size},
        "max_image_size": {"longest_edge": size}, "do_pad": True,  # as LLaVA's own code does
    }  # fmt: skip
    for key in ("min_pixels", "max_pixels"):
        if v.has(f"image_{key}"):
            processor[key] = v.count(f"image_{key}", high=1 << 40)
    if _newline(f):
        seer = "LlavaNextForConditionalGeneration"
        flat = v.indices("image_grid_pinpoints", below=1 << 16)
        pairs = [list(pair) for pair in zip(flat[::2], flat[1::2], strict=False)]
        config["image_grid_pinpoints"] = processor["image_grid_pinpoints"] = pairs
    return seer, config, processor
