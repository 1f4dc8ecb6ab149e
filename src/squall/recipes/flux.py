"""The transformer of FLUX.1: its original files, alone or with all parts, GGUF, and diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from squall.checkpoints.base import Checkpoint, Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes.fields import NEUTRAL, Fields
from squall.recipes.linears import FLUX, linears, named, stored
from squall.recipes.names import Naming, Part, check_applied, place
from squall.roles import FLUX_STREAMS
from squall.spec import Flux

# Of files with more than the transformer, what its tensors begin with.
PREFIX = "model.diffusion_model."
# What diffusers takes for what a config.json does not say.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": False, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
# Widths of feed-forwards, by that of rows.
MLP_RATIO = 4
MOST_LAYERS = 1024

# Roles and tensors of each layout; {} is a stream.
_ORIGINAL = {
    "picture_in": "img_in", "text_in": "txt_in", "final.out": "final_layer.linear",
    "final.shift": "final_layer.shift", "final.scale": "final_layer.scale",
    "modulation": "modulation.lin", "attention.q": "linear1.q", "attention.k": "linear1.k",
    "attention.v": "linear1.v", "feed_forward.up": "linear1.up", "out": "linear2",
    "attention.q_norm": "norm.query_norm.scale", "attention.k_norm": "norm.key_norm.scale",
    "{}.modulation": "{}_mod.lin", "{}.attention.out": "{}_attn.proj",
    **{f"{{}}.attention.{part}": f"{{}}_attn.{part}" for part in "qkv"},
    "{}.attention.q_norm": "{}_attn.norm.query_norm.scale",
    "{}.attention.k_norm": "{}_attn.norm.key_norm.scale",
    "{}.feed_forward.up": "{}_mlp.0", "{}.feed_forward.down": "{}_mlp.2",
}  # fmt: skip
_FOLDER = {
    "picture_in": "x_embedder", "text_in": "context_embedder", "final.out": "proj_out",
    "final.shift": "norm_out.shift", "final.scale": "norm_out.scale",
    "modulation": "norm.linear", "feed_forward.up": "proj_mlp", "out": "proj_out",
    **{f"attention.{part}": f"attn.to_{part}" for part in "qkv"},
    "attention.q_norm": "attn.norm_q", "attention.k_norm": "attn.norm_k",
    "picture.modulation": "norm1.linear", "text.modulation": "norm1_context.linear",
    **{f"picture.attention.{part}": f"attn.to_{part}" for part in "qkv"},
    **{f"text.attention.{part}": f"attn.add_{part}_proj" for part in "qkv"},
    "picture.attention.out": "attn.to_out.0", "text.attention.out": "attn.to_add_out",
    "picture.attention.q_norm": "attn.norm_q", "picture.attention.k_norm": "attn.norm_k",
    "text.attention.q_norm": "attn.norm_added_q", "text.attention.k_norm": "attn.norm_added_k",
    "picture.feed_forward.up": "ff.net.0.proj", "picture.feed_forward.down": "ff.net.2",
    "text.feed_forward.up": "ff_context.net.0.proj", "text.feed_forward.down": "ff_context.net.2",
}  # fmt: skip
_SHORT = {"picture": "img", "text": "txt"}
_TOLD = {"time": "timestep_embedder", "guidance": "guidance_embedder", "pooled": "text_embedder"}


class _Config(Fields):
    def _is_harmless(self, key: str, value: object) -> bool:
        return key.startswith("_") or value in NEUTRAL or (key, value) == ("patch_size", 1)


def load_flux(checkpoint: Checkpoint) -> Part:
    """The transformer of a checkpoint, in whichever layout."""
    _check_kind(checkpoint)
    tensors, originals = checkpoint.tensors, dict[str, str]()
    original = "img_in.weight" in tensors
    said = "num_layers" in checkpoint.metadata or not original
    spec = _spec(checkpoint.metadata if said else config_of(tensors), tensors)
    naming = _naming(spec, original=original)
    if checkpoint.kind == "uqff":
        tensors, originals = named(linears(FLUX, spec, naming), tensors)
    (part,) = place([Part("flux", spec, naming)], tensors, read=set())
    return replace(part, names=stored(part.names, originals))


def alone(checkpoint: Checkpoint) -> Checkpoint:
    """Of a file with all parts of a model the transformer; what is one by itself stays so."""
    found = {name: t for name, t in checkpoint.tensors.items() if name.startswith(PREFIX)}
    own = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    return replace(checkpoint, tensors=own) if own else checkpoint


def _check_kind(checkpoint: Checkpoint) -> None:
    if checkpoint.kind == "gguf":
        found = checkpoint.metadata.get("general.architecture")
        if found != "flux":
            raise UnsupportedModel(f"the GGUF file is of the architecture {quote(str(found))}")
    found = checkpoint.metadata.get("_class_name", FLUX)
    if found != FLUX:
        raise UnsupportedModel(f"config.json is of {quote(str(found))}, not of {FLUX}")
    check_applied(checkpoint)


def _spec(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Flux:
    c = _Config({**DEFAULTS, **config}, tensors)
    patch, size = c.count("in_channels"), c.count("attention_head_dim", high=512)
    if config.get("out_channels") not in (None, patch):
        raise UnsupportedModel(f"out_channels differs from in_channels, {patch}: another model")
    c.skip("out_channels")
    heads = c.count("num_attention_heads", high=1 << 12)
    axes = c.indices("axes_dims_rope", below=size + 1)
    if len(axes) != 3 or sum(axes) != size or any(axis % 2 for axis in axes):
        raise InvalidCheckpoint(
            f"axes of rotary positions are {axes}; they must be three even sizes, {size} in all"
        )
    hidden = heads * size
    spec = Flux(
        patch, hidden, heads, size,
        c.count("num_layers", high=MOST_LAYERS), c.count("num_single_layers", high=MOST_LAYERS),
        c.count("joint_attention_dim"), c.count("pooled_projection_dim"),
        (axes[0], axes[1], axes[2]), MLP_RATIO * hidden, guidance=c.flag("guidance_embeds", False),
    )  # fmt: skip
    c.check_all_read()
    return spec


def config_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What diffusers' config.json would say of an original file, by the shapes of its tensors."""

    def shape(name: str, dims: int = 2) -> tuple[int, ...]:
        found = tensors[name].shape if name in tensors else ()
        if len(found) != dims or not all(found):
            raise InvalidCheckpoint(f"the tensor {name} is missing, or has shape {found}")
        return found

    hidden, patch = shape("img_in.weight")
    (size,) = shape("double_blocks.0.img_attn.norm.query_norm.scale", 1)
    if hidden % size:
        raise InvalidCheckpoint(f"rows of {hidden} values are no heads of {size}")
    return {
        "_class_name": FLUX, "in_channels": patch, "attention_head_dim": size,
        "num_attention_heads": hidden // size, "num_layers": _depth(tensors, "double_blocks"),
        "num_single_layers": _depth(tensors, "single_blocks"),
        "joint_attention_dim": shape("txt_in.weight")[1],
        "pooled_projection_dim": shape("vector_in.in_layer.weight")[1],
        "axes_dims_rope": [size // 8, 7 * size // 16, 7 * size // 16],
        "guidance_embeds": "guidance_in.in_layer.weight" in tensors,
    }  # fmt: skip


def _depth(tensors: Mapping[str, Tensor], name: str) -> int:
    found = {int(match[1]) for t in tensors if (match := re.match(rf"{name}\.(\d{{1,4}})\.", t))}
    if not found or max(found) >= MOST_LAYERS:
        raise InvalidCheckpoint(f"the file has no {name}, or more than {MOST_LAYERS}")
    return max(found) + 1


def _naming(spec: Flux, *, original: bool) -> Naming:
    stems, streams = {}, _SHORT if original else {kind: kind for kind in FLUX_STREAMS}
    for role, name in (_ORIGINAL if original else _FOLDER).items():
        for kind in streams if "{}" in role else ("",):
            stems[role.format(kind)] = name.format(streams.get(kind, ""))
    for role, name in _TOLD.items():
        short = "vector" if role == "pooled" else role
        one, two = (
            (f"{short}_in.in_layer", f"{short}_in.out_layer")
            if original
            else (f"time_text_embed.{name}.linear_1", f"time_text_embed.{name}.linear_2")
        )
        stems |= {f"{role}.in": one, f"{role}.out": two}
    double, single = (
        ("double_blocks", "single_blocks")
        if original
        else ("transformer_blocks", "single_transformer_blocks")
    )
    each = [f"{double}.{n}." for n in range(spec.double)]
    each += [f"{single}.{n}." for n in range(spec.single)]
    fused: dict[str, tuple[str, ...]] = {"norm_out.linear": ("final.scale", "final.shift")}
    if original:
        fused = {
            "final_layer.adaLN_modulation.1": ("final.shift", "final.scale"),
            "linear1": (*(f"attention.{part}" for part in "qkv"), "feed_forward.up"),
            **{
                f"{short}_attn.qkv": tuple(f"{kind}.attention.{part}" for part in "qkv")
                for kind, short in _SHORT.items()
            },
        }
    return Naming(stems, "", fused=MappingProxyType(fused), each=tuple(each))
