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
from squall.recipes.names import Naming, Part, place
from squall.spec import Activation, Connector, Decoder, Layer, Mlp, Norm, Rope, Tower

SOURCE = "mmproj"
STEMS: Mapping[str, str] = {
    "patches": "v.patch_embd", "class": "v.class_embd", "positions": "v.position_embd",
    "pre_norm": "v.pre_ln", "norm": "v.post_ln", "attention.norm": "ln1",
    "feed_forward.norm": "ln2", **{f"attention.{role}": f"attn_{role}" for role in "qkv"},
    "attention.out": "attn_out",
    **{f"feed_forward.{role}": f"ffn_{role}" for role in ("gate", "up", "down")},
}  # fmt: skip
LAYER, BREAK = "v.blk.{}.", "v.token_embd.img_break"
FUSED = {"attn_qkv": ("attention.q", "attention.k", "attention.v")}
SWAPPED = {"feed_forward.up": "ffn_down", "feed_forward.down": "ffn_up"}
TWO_LINEARS = {"linear0": "mm.0", "linear1": "mm.2"}


@dataclass(frozen=True, slots=True)
class Projector:
    """A kind of connector, and of the tower and the pictures that go with it.

    seer: the class of transformers whose processor reads them. stems: of its weights, by role.
    sizes: what preprocessor_config.json calls the pixels of a picture's edge.
    merge: the key of how many patches in a row become one, and the default; 0: the file must say.
    turns: whether lines and columns have the same frequencies; None: positions are learned.
    gated: MLPs are, and norms are RMS norms.
    """

    seer: str
    stems: Mapping[str, str]
    sizes: tuple[str, ...] = ()
    merge: tuple[str, int] | None = None
    turns: bool | None = None
    gated: bool = False


_SCALE, _MERGE = "projector.scale_factor", "spatial_merge_size"
PROJECTORS: Mapping[str, Projector] = {
    "mlp": Projector(
        "Llava", {**TWO_LINEARS, "newline": "model.image_newline"}, ("shortest_edge",)
    ),
    "qwen2vl_merger": Projector("Qwen2VL", TWO_LINEARS, (), (_MERGE, 2), True),
    "qwen2.5vl_merger": Projector("Qwen2_5_VL", TWO_LINEARS, (), (_MERGE, 2), True, True),
    "gemma3": Projector(
        "Gemma3", {"norm": "mm.soft_emb_norm", "linear0": "mm.input_projection"},
        ("height", "width"), (_SCALE, 4),
    ),
    "idefics3": Projector("Idefics3", {"linear0": "mm.model.fc"}, ("longest_edge",), (_SCALE, 0)),
    "pixtral": Projector(
        "Mistral3", {"linear0": "mm.1", "linear1": "mm.2", "norm": "mm.input_norm",
        "mix": "mm.patch_merger"}, ("longest_edge",), (_MERGE, 1), False, True,
    ),
}  # fmt: skip
# Of pictures, which `described` reads; and what tensors and processors tell.
_KNOWN = "image_mean image_std image_min_pixels image_max_pixels preproc_image_size window_size"
_KNOWN += " feed_forward_length projection_dim image_crop_resolution image_aspect_ratio"
_KNOWN += " image_split_resolution image_grid_pinpoints mm_patch_merge_type mm_projector_type"
_KNOWN += " has_vision_encoder has_text_encoder has_llava_projector has_qwen2vl_merger"


class _File:
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
        self.depth, self.hidden = parts.depth(v), parts.hidden(v)
        # After how many layers rows are read; there are none beyond.
        self.read = v.indices("feature_layer", below=self.depth + 1) or (self.depth,)
        self.class_token = "v.class_embd" in self.tensors
        self.siglip = self.projector.turns is None and not self.class_token
        # Pictures are in tiles, whose lines end with a learned row.
        pinned = v.has("image_grid_pinpoints") or "model.image_newline" in self.tensors
        self.tiled = kind == "mlp" and pinned

    def shape(self, name: str) -> tuple[int, int]:
        found = self.tensors[name].shape if name in self.tensors else ()
        if len(found) != 2:
            raise InvalidCheckpoint(f"the tensor {name} is missing, or no matrix")
        return found[0], found[1]

    def activation(self) -> Activation:
        gelu, silu = self.top.flag("use_gelu", False), self.top.flag("use_silu", False)
        named: Activation = "silu" if silu else "gelu" if gelu else "quick_gelu"
        return "gelu_tanh" if self.siglip else named


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


def add(decoder: Decoder, checkpoint: Checkpoint, *, scaled: bool = False) -> tuple[Part, ...]:
    """Tower and connector of an `opened` file, for this decoder.

    scaled: it scales images as it does tokens.
    """
    f = _File(checkpoint)
    made = _tower(f), _connector(f, decoder, decoder.embed_scale if scaled else 1.0)
    for fields in (f.vision, f.top):
        fields.skip(*_KNOWN.split())
        fields.check_all_read()
    return place(made, f.tensors, read={BREAK}, source=SOURCE)


def _tower(f: _File) -> Part:
    v, turns, gated = f.vision, f.projector.turns, f.projector.gated
    eps = v.number("attention.layer_norm_epsilon", low=1e-15, high=1.0)
    norm = Norm("rms", eps) if gated else Norm("layer", eps, bias=True)
    bias, rope, local = f.kind != "pixtral", None, frozenset[int]()
    if turns is not None:
        rope = turned(Rope(10000.0, parts.head_dim(v), interleaved=not turns), shared=turns)
    if f.kind == "qwen2.5vl_merger":
        period = v.count("n_wa_pattern", high=4096)
        local = frozenset(i for i in range(f.depth) if (i + 1) % period)
    down = f.shape(f"{LAYER.format(0)}ffn_down.weight")
    swapped = down[1] == f.hidden
    mlp = Mlp(down[not swapped], f.activation(), gated, bias)
    heads = parts.attention(v, rope, qkv_bias=bias, out_bias=bias)
    spec = Tower(
        3 * f.patch**2, f.hidden, tuple(Layer(each, mlp, norm) for each in heads), bias=f.siglip,
        class_token=f.class_token, positions=f.side**2 + f.class_token if turns is None else 0,
        pre_norm=norm if f.class_token or f.kind == "pixtral" else None,
        norm=None if f.kind in ("mlp", "pixtral") else norm,
        local=local, read=() if f.read == (f.depth,) else f.read,
    )  # fmt: skip
    names = Naming({**STEMS, **(SWAPPED if swapped else {})}, LAYER, fused=FUSED)
    return Part("tower", spec, names)


def _connector(f: _File, decoder: Decoder, scale: float) -> Part:
    stems, gemma = f.projector.stems, f.kind == "gemma3"
    shapes = [f.shape(f"{stem}.weight") for role, stem in stems.items() if "linear" in role]
    width, tokens = shapes[-1][gemma], (f.side // f.merge) ** 2
    if width != decoder.hidden:
        raise InvalidCheckpoint(
            f"the mmproj file makes rows of {width} values, and this model's have "
            f"{decoder.hidden}: it belongs to another model"
        )
    if gemma and any((each.attention.window or tokens) < tokens for each in decoder.layers):
        raise UnsupportedModel(f"an image's {tokens} tokens must fit into the sliding window")
    eps = f.vision.number("attention.layer_norm_epsilon") if gemma else decoder.norm.eps
    normed = f"{stems.get('norm')}.weight" in f.tensors
    spec = Connector(
        f.hidden * len(f.read), (shapes[0][0], width)[-len(shapes) :],
        "gelu" if len(shapes) > 1 else None, bias=f"{stems['linear0']}.bias" in f.tensors,
        norm=Norm("rms", eps) if normed or gemma else None, merge=f.merge**2, mean=gemma,
        mix="mix" in stems and normed, newlines=int(f.tiled), scale=scale,
    )  # fmt: skip
    names = Naming(stems, "", transposed=frozenset({"linear0"} if gemma else ()))
    return Part("connector", spec, names)


def described(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """A class of transformers, and what its config.json and preprocessor_config.json would say."""
    f = _File(checkpoint)
    v, size = f.vision, f.image
    vision = {
        "model_type": "siglip_vision_model" if f.siglip else "clip_vision_model",
        "image_size": size, "patch_size": f.patch, "temporal_patch_size": 1,
        "spatial_merge_size": f.merge, "window_size": v.count("window_size", 112),
    }  # fmt: skip
    longest = 4 * size if f.kind == "idefics3" else size
    longest = v.count("preproc_image_size", longest, high=1 << 16)
    said: dict[str, Any] = {
        "vision_config": vision, "scale_factor": f.merge, "spatial_merge_size": f.merge,
        "mm_tokens_per_image": (f.side // f.merge) ** 2,
        "vision_feature_select_strategy": "full" if f.siglip else "default",
        "image_mean": v.numbers("image_mean", 3), "image_std": v.numbers("image_std", 3),
        "size": dict.fromkeys(f.projector.sizes, longest),
        "crop_size": {"height": size, "width": size},
        "max_image_size": {"longest_edge": size}, "do_pad": True,  # as LLaVA's own code does
    }  # fmt: skip
    for key in ("min_pixels", "max_pixels"):
        if v.has(f"image_{key}"):
            said[key] = v.count(f"image_{key}", high=1 << 40)
    if f.tiled:
        flat = v.indices("image_grid_pinpoints", below=1 << 16)
        pairs = zip(flat[::2], flat[1::2], strict=False)
        said["image_grid_pinpoints"] = [list(pair) for pair in pairs]
    return f"{f.projector.seer}{'Next' * f.tiled}ForConditionalGeneration", said
