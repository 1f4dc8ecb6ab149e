"""A transformers model -> a GGUF file of f32 tensors, by the rules of llama.cpp's converter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

NAMES = [
    (r"model\.embed_tokens", "token_embd"),
    (r"model\.(norm|final_layernorm)", "output_norm"),
    (r"lm_head", "output"),
    (r"dense_([23])", r"dense_\1"),  # of EmbeddingGemma, after pooling
    (r"cls\.output", "cls.output"),  # of rerankers
    (r"model\.layers\.(\d+)\.input_layernorm", r"blk.\1.attn_norm"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj", r"blk.\1.attn_\2"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm", r"blk.\1.attn_\2_norm"),
    (r"model\.layers\.(\d+)\.self_attn\.qkv_proj", r"blk.\1.attn_qkv"),
    (r"model\.layers\.(\d+)\.self_attn\.(o_proj|dense)", r"blk.\1.attn_output"),
    (r"model\.layers\.(\d+)\.mlp\.gate_proj", r"blk.\1.ffn_gate"),
    (r"model\.layers\.(\d+)\.mlp\.(up_proj|fc1|c_fc|gate_up_proj)", r"blk.\1.ffn_up"),
    (r"model\.layers\.(\d+)\.mlp\.(down_proj|fc2|c_proj)", r"blk.\1.ffn_down"),
    (r"model\.layers\.(\d+)\.mlp\.gate", r"blk.\1.ffn_gate_inp"),
    (r"model\.layers\.(\d+)\.pre_feedforward_layernorm", r"blk.\1.ffn_norm"),
    (r"model\.layers\.(\d+)\.post_feedforward_layernorm", r"blk.\1.post_ffw_norm"),
]
POST_NORM = r"model\.layers\.(\d+)\.post_attention_layernorm"
EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj")
PERMUTED = {"llama", "granite", "smollm3"}
UNIT_OFFSET = {"gemma", "gemma2", "gemma3", "gemma-embedding"}
OWN_POST_NORM = {"gemma2", "gemma3", "gemma-embedding", "olmo2"}
NO_ROPE_BASE = {"phi2", "gemma", "gemma2"}
ROPE_DIMENSIONS = {"llama", "granite", "smollm3", "phi2", "phi3"}


def convert(
    model: torch.nn.Module,
    architecture: str,
    path: Path,
    *,
    single_experts: bool = False,
    fuse_qkv: bool = False,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `model`; `single_experts`: one tensor each, `fuse_qkv`: q, k and v in one tensor."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    _metadata(writer, architecture, config)
    for key, value in (extra or {}).items():
        add: dict[type, Any] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
            str: writer.add_string,
        }
        own = key.startswith("tokenizer.")
        add[type(value)](key if own else f"{architecture}.{key}", value)
    tensors = dict(_tensors(model, architecture, single_experts=single_experts))
    if fuse_qkv:
        _fuse(tensors, config.num_hidden_layers)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for name in ("rms_norm_eps", "norm_epsilon", "layer_norm_eps"):
        if hasattr(config, name):
            rms = name == "rms_norm_eps"
            add = writer.add_layer_norm_rms_eps if rms else writer.add_layer_norm_eps
            add(getattr(config, name))
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture in ROPE_DIMENSIONS:
        dims = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(dims)
    if architecture not in NO_ROPE_BASE:
        writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for name in ("num_local_experts", "num_experts"):
        if getattr(config, name, None):
            writer.add_expert_count(getattr(config, name))
            writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _scaling(writer, rope, config)
    _multipliers(writer, config)


def _scaling(writer: gguf.GGUFWriter, rope: dict[str, Any], config: Any) -> None:
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in {
            "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }.items():
            if rope.get(name) is not None:
                add(rope[name])
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        growth = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(growth) / math.log(original)))


def _multipliers(writer: gguf.GGUFWriter, config: Any) -> None:
    for name, add in {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }.items():
        if getattr(config, name, None) is not None:
            add(getattr(config, name))


def _tensors(
    model: torch.nn.Module, architecture: str, *, single_experts: bool
) -> Iterator[tuple[str, Tensor]]:
    config = model.config
    post = "post_attention_norm" if architecture in OWN_POST_NORM else "ffn_norm"
    names = [*NAMES, (POST_NORM, rf"blk.\1.{post}")]
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
            continue
        if match := EXPERTS.fullmatch(name):
            yield from _experts(match, value, single=single_experts)
            continue
        tensor = value
        stem, kind = name.rsplit(".", 1)
        if architecture in UNIT_OFFSET and stem.endswith("norm"):
            tensor = tensor + 1
        projection = re.search(r"self_attn\.([qk])_proj", name)
        if architecture in PERMUTED and projection:
            tensor = _permute(tensor, heads[projection[1]])
        (new,) = [re.sub(old, to, stem) for old, to in names if re.fullmatch(old, stem)]
        yield f"{new}.{kind}", tensor
    yield from _factors(config)


def _permute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to pairs."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _experts(match: re.Match[str], value: Tensor, *, single: bool) -> Iterator[tuple[str, Tensor]]:
    parts = {"down": value}
    if match[2] == "gate_up":
        parts = dict(zip(("gate", "up"), value.chunk(2, dim=1), strict=True))
    for name, tensor in parts.items():
        if single:
            for expert, weight in enumerate(tensor):
                yield f"blk.{match[1]}.ffn_{name}.{expert}.weight", weight
        else:
            yield f"blk.{match[1]}.ffn_{name}_exps.weight", tensor


def _factors(config: Any) -> Iterator[tuple[str, Tensor]]:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"])
    if rope["rope_type"] == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        dims = head_dim(config)
        base = 1.0 / rope["rope_theta"] ** (torch.arange(0, dims, 2).float() / dims)
        yield "rope_freqs.weight", base / scaled


def _fuse(tensors: dict[str, Tensor], layers: int) -> None:
    for layer in range(layers):
        for kind in ("weight", "bias"):
            names = [f"blk.{layer}.attn_{part}.{kind}" for part in "qkv"]
            if names[0] in tensors:
                fused = torch.cat([tensors.pop(name) for name in names])
                tensors[f"blk.{layer}.attn_qkv.{kind}"] = fused
