"""GGUF tensor names: where a decoder's weights lie in a file, and whether their shapes fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from squall.checkpoints.base import Tensor
from squall.checkpoints.gguf_header import quote
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.program import Names, Slice
from squall.roles import Shapes

STEMS = {
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
}
# Tensors of several roles, one after another, where the first has no tensor of its own.
FUSED = {
    "attn_qkv": ("attention.q", "attention.k", "attention.v"),
    "ffn_up": ("feed_forward.gate", "feed_forward.up"),
}
HARMLESS = re.compile(r"blk\.\d+\.attn_rot_embd(\.\w+)?")  # rope tables of early converters
ROLE = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)")


def locate(shapes: Shapes, tensors: Mapping[str, Tensor], *, read: set[str]) -> Names:
    """The slices of every role; refuses missing, misshapen and unused tensors but `read`."""
    names: dict[str, tuple[Slice, ...]] = {}
    for role in shapes:
        names[role] = _locate(role, shapes, tensors)
    used = read | {part.tensor for parts in names.values() for part in parts}
    unused = sorted(name for name in tensors if name not in used and not HARMLESS.fullmatch(name))
    if unused:
        listed = ", ".join(quote(name) for name in unused[:6])
        listed += f" and {len(unused) - 6} more" if unused[6:] else ""
        raise UnsupportedModel(
            f"the file has tensors that its architecture does not use: {listed}; "
            "it is a variant that Squall cannot run"
        )
    return MappingProxyType(names)


def gguf_name(role: str) -> str:
    """The usual tensor name of a role: `layers.3.attention.q.weight` is `blk.3.attn_q.weight`."""
    layer, stem, kind = _split(role)
    return f"{layer}{STEMS[stem]}.{kind}"


def _split(role: str) -> tuple[str, str, str]:
    match = ROLE.fullmatch(role)
    assert match is not None
    layer, stem, kind = match.groups()
    return "" if layer is None else f"blk.{layer}.", stem, kind


def _locate(role: str, shapes: Shapes, tensors: Mapping[str, Tensor]) -> tuple[Slice, ...]:
    name = gguf_name(role)
    parts = _fused(role, shapes, tensors) or _experts(name, shapes[role], tensors)
    return parts or (_whole(name, shapes[role], tensors),)


def _whole(name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Slice:
    if name not in tensors:
        raise InvalidCheckpoint(f"the tensor {name!r} is missing; its shape would be {shape}")
    found = tensors[name].shape
    if found != shape:
        raise InvalidCheckpoint(f"tensor {name!r} has shape {found}, the metadata asks for {shape}")
    rows = 1
    for size in shape[:-1] or shape:
        rows *= size
    return Slice(name, 0, rows)


def _fused(role: str, shapes: Shapes, tensors: Mapping[str, Tensor]) -> tuple[Slice, ...]:
    layer, stem, kind = _split(role)
    for fused, stems in FUSED.items():
        group = [f"{role.removesuffix(f'{stem}.{kind}')}{s}.{kind}" for s in stems]
        name = f"{layer}{fused}.{kind}"
        if role not in group or group[0] not in shapes or name not in tensors:
            continue
        if gguf_name(group[0]) in tensors:
            continue
        sizes = [shapes[member][0] for member in group]
        _whole(name, (sum(sizes), *shapes[role][1:]), tensors)
        start = sum(sizes[: group.index(role)])
        return (Slice(name, start, start + shapes[role][0]),)
    return ()


def _experts(name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> tuple[Slice, ...]:
    """One tensor an expert (`blk.0.ffn_up.7.weight`), as early Mixtral files have them."""
    if len(shape) != 3 or name in tensors:
        return ()
    single = [name.replace("_exps.", f".{expert}.") for expert in range(shape[0])]
    return tuple(_whole(expert, shape[1:], tensors) for expert in single)
