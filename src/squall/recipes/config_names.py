"""Tensor names of transformers' checkpoints: one family, and how its members differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from squall.checkpoints.base import Tensor
from squall.recipes.names import Naming

_ROPE_TABLE = r"(\w+\.)*rotary_emb\.(inv_freq|original_inv_freq|(cos|sin)_cached)"
ROPE_TABLE = re.compile(_ROPE_TABLE)  # computed anew

USUAL = Naming(
    stems={
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "attention.norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "attention.out": "self_attn.o_proj",
        "attention.post_norm": "post_self_attn_layernorm",
        "feed_forward.norm": "post_attention_layernorm",
        "feed_forward.post_norm": "post_mlp_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
        "feed_forward.router": "mlp.gate",
        # Stacked experts are not stored; the names stand for all pieces.
        "feed_forward.experts.gate": "mlp.experts.gate_proj",
        "feed_forward.experts.up": "mlp.experts.up_proj",
        "feed_forward.experts.down": "mlp.experts.down_proj",
    },
    layer="model.layers.{}.",
    pieces={
        "feed_forward.experts.gate": "mlp.experts.{}.gate_proj",
        "feed_forward.experts.up": "mlp.experts.{}.up_proj",
        "feed_forward.experts.down": "mlp.experts.{}.down_proj",
    },
    fused={
        "self_attn.qkv_proj": ("attention.q", "attention.k", "attention.v"),
        "mlp.gate_up_proj": ("feed_forward.gate", "feed_forward.up"),
    },
    harmless=ROPE_TABLE,
)


def _like(naming: Naming, stems: Mapping[str, str], **pieces: str) -> Naming:
    experts = {f"feed_forward.experts.{role}": name for role, name in pieces.items()}
    return replace(naming, stems={**naming.stems, **stems}, pieces={**naming.pieces, **experts})


POST_NORMS = _like(
    USUAL,
    {
        "attention.post_norm": "post_attention_layernorm",
        "feed_forward.norm": "pre_feedforward_layernorm",
        "feed_forward.post_norm": "post_feedforward_layernorm",
    },
)
SPARSE_BLOCK = _like(
    USUAL,
    {"feed_forward.router": "block_sparse_moe.gate"},
    gate="block_sparse_moe.experts.{}.w1",
    up="block_sparse_moe.experts.{}.w3",
    down="block_sparse_moe.experts.{}.w2",
)
NUMBERED_MLP = _like(
    USUAL,
    {
        "norm": "model.final_layernorm",
        "attention.q_norm": "self_attn.q_layernorm",
        "attention.k_norm": "self_attn.k_layernorm",
        "attention.out": "self_attn.dense",
        "feed_forward.up": "mlp.fc1",
        "feed_forward.down": "mlp.fc2",
    },
)
CODE_MLP = _like(USUAL, {"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"})
NORM_PER_HEAD = replace(
    USUAL,
    pieces={
        "attention.q_norm": "self_attn.q_layernorm.norms.{}",
        "attention.k_norm": "self_attn.k_layernorm.norms.{}",
    },
)
# What the language model of a multimodal one is called in it, without a last `model`.
_INNER = ("model.language_model.", "language_model.model.", "model.text_model.")


def in_multimodal(naming: Naming, tensors: Mapping[str, Tensor]) -> Naming:
    found = (inner for inner in _INNER if any(name.startswith(inner) for name in tensors))
    inner = next(found, "model.")
    heads = (f"{where}lm_head" for where in ("", "language_model.", "model."))
    head = next((name for name in heads if f"{name}.weight" in tensors), "lm_head")
    moved = {
        role: name.replace("model.", inner, 1) if name.startswith("model.") else name
        for role, name in naming.stems.items()
    }
    return replace(naming, stems={**moved, "head": head}, layer=f"{inner}layers.{{}}.")
