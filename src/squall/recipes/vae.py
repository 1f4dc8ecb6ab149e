"""Autoencoders: the original file of FLUX, `ae.safetensors`, and folders of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from squall.checkpoints.base import Checkpoint, Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes.config_fields import flatten
from squall.recipes.fields import NEUTRAL, Fields
from squall.recipes.names import Naming, Part, place
from squall.roles import roles
from squall.spec import AutoEncoder

# The only values that can be followed.
KNOWN: Mapping[str, tuple[object, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "in_channels": (3,),
    "out_channels": (3,),
    "use_quant_conv": (False,),
    "use_post_quant_conv": (False,),
}
MOST_WIDTH, MOST_LEVELS, MOST_BLOCKS = 1 << 14, 8, 64
# What roles have, and the tensors of diffusers in its place; it counts the levels of decoders from
# the coarsest. FLUX's own files have the names of roles.
Pairs = tuple[tuple[str, str], ...]
FOLDER: Pairs = (
    (r"\.(down|up)\.(\d+)\.block", r".\1_blocks.\2.resnets"),
    (r"\.(down|up)\.(\d+)\.(down|up)sample", r".\1_blocks.\2.\3samplers.0"),
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
    ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
    ("mid.attn_1.", "mid_block.attentions.0.to_"),
    ("nin_shortcut", "conv_shortcut"),
    ("norm_out", "conv_norm_out"),
)
OLDER: Pairs = (
    *FOLDER, ("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")
)  # fmt: skip


class _Config(Fields):
    def _is_harmless(self, key: str, value: object) -> bool:
        known = (*KNOWN, "sample_size", "force_upcast")
        return key.startswith("_") or key in known or value in (*NEUTRAL, [])


def load_vae(checkpoint: Checkpoint) -> Part:
    """The autoencoder of a checkpoint, in whichever layout."""
    tensors, given = checkpoint.tensors, checkpoint.metadata
    layout = _layout(tensors)
    if not given or (not layout and given.get("_class_name") not in KNOWN["_class_name"]):
        # There is no config.json, or it is another model's.
        given = _flux(tensors, "down_blocks.{}.resnets.{}" if layout else "down.{}.block.{}")
    spec = _spec(_Config(dict(flatten(given)), tensors))
    for key, known in KNOWN.items():
        found = given.get(key, [])
        if any(value not in known for value in (found if isinstance(found, list) else [found])):
            raise UnsupportedModel(f"{key} is {found!r:.99} of the autoencoder; known: {known[0]}")
    return place([Part("vae", spec, naming(spec, layout))], tensors, read=set())[0]


def _layout(tensors: Mapping[str, Tensor]) -> Pairs:
    if "decoder.up.0.block.0.conv1.weight" in tensors:
        return ()
    if "decoder.up_blocks.0.resnets.0.conv1.weight" in tensors:
        older = "decoder.mid_block.attentions.0.query.weight" in tensors
        return OLDER if older else FOLDER
    raise InvalidCheckpoint(
        "the file is no autoencoder: it has neither decoder.up.0.block.0.conv1.weight, as "
        "ae.safetensors has, nor decoder.up_blocks.0.resnets.0.conv1.weight, as diffusers has"
    )


def _flux(tensors: Mapping[str, Tensor], block: str) -> dict[str, Any]:
    """What a config.json would say of FLUX's file: sizes as its tensors have them."""

    def channels(name: str, axis: int = 0) -> int:
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) != 4:
            raise InvalidCheckpoint(f"the tensor {name} is missing, or has shape {shape}")
        return shape[axis]

    def all_of(name: str) -> list[int]:
        found = map(name.format, range(len(tensors)))
        return [channels(one) for one in takewhile(tensors.__contains__, found)]

    first = f"encoder.{block}.conv1.weight"
    widths = all_of(first.format("{}", 0))
    return {
        "block_out_channels": widths,
        "latent_channels": channels("decoder.conv_in.weight", 1),
        "layers_per_block": len(all_of(first.format(0, "{}"))),
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }


def _spec(c: Fields) -> AutoEncoder:
    widths = c.indices("block_out_channels", below=MOST_WIDTH + 1)
    groups = c.count("norm_num_groups", 32, high=MOST_WIDTH)
    if not 1 <= len(widths) <= MOST_LEVELS or any(not n or n % groups for n in widths):
        raise InvalidCheckpoint(
            f"block_out_channels is {widths!s:.99}; it must be 1 to {MOST_LEVELS} multiples of "
            f"norm_num_groups, which is {groups}"
        )
    spec = AutoEncoder(
        c.count("latent_channels", high=MOST_WIDTH),
        widths,
        c.count("layers_per_block", high=MOST_BLOCKS),
        groups,
        c.number("scaling_factor"),
        c.number("shift_factor", 0.0, low=-1e9),
        attends=c.flag("mid_block_add_attention", True),
    )
    c.check_all_read()
    return spec


def naming(spec: AutoEncoder, pairs: Pairs) -> Naming:
    """Of a layout: what `pairs` make of roles."""
    last, stems = len(spec.widths) - 1, {}
    for role in roles(spec):
        name = stem = role.rpartition(".")[0]
        if pairs:
            name = re.sub(r"(?<=\.up\.)\d+", lambda level: str(last - int(level[0])), name)
        for pattern, other in pairs:
            name = re.sub(pattern, other, name)
        stems[stem] = name
    return Naming(stems, "")
