"""Tiny random transformers models of every architecture, with every option in use."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any

PROMPT = 40
CONTEXT = 64

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
RMS = {"rms_norm_eps": 0.01}
LONG = RMS | {"max_position_embeddings": 8192}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = RMS | {"head_dim": 64, "tie_word_embeddings": True}
GEMMA2 = GEMMA | {
    "sliding_window": 7,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 64,
}
GEMMA3 = GEMMA | {"sliding_window": 7, "num_hidden_layers": 7, "query_pre_attn_scalar": 64}
DEEP = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "query_pre_attn_scalar": 16}


def longrope(original: int) -> dict[str, Any]:
    """Per-frequency factors for 16 frequencies."""
    factors = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        "short_factor": [1.0 + 0.05 * i for i in range(16)],
        "long_factor": [1.0 + 0.4 * i for i in range(16)],
    }
    return rope(factors) | {"original_max_position_embeddings": original}


def rope(kind: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": dict(kind)}


@dataclass(frozen=True)
class Case:
    """A model class of transformers, its configuration, and how to write it."""

    name: str
    architecture: str
    model: str
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    context: int = CONTEXT

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("llama", "llama", "LlamaForCausalLM", RMS),
    Case("llama-biased-tied", "llama", "LlamaForCausalLM", RMS | {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Case("llama-odd", "llama", "LlamaForCausalLM", RMS | {
        "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 24,
        "intermediate_size": 100, "vocab_size": 150}),
    Case("llama-llama3", "llama", "LlamaForCausalLM", RMS | rope(LLAMA3)),
    Case("llama-linear", "llama", "LlamaForCausalLM", RMS | rope(
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0})),
    Case("llama-yarn", "llama", "LlamaForCausalLM", LONG | rope(YARN)),
    Case("llama-yarn-own", "llama", "LlamaForCausalLM", RMS | rope(YARN | {
        "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0})),
    Case("mistral", "llama", "MistralForCausalLM", RMS | {"sliding_window": 7, "head_dim": 32}),
    Case("mixtral", "llama", "MixtralForCausalLM", RMS | {
        "num_local_experts": 6, "num_experts_per_tok": 2}),
    Case("mixtral-single", "llama", "MixtralForCausalLM", RMS | {
        "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 7},
        {"single_experts": True}),
    Case("qwen2", "qwen2", "Qwen2ForCausalLM", RMS),
    Case("qwen2-yarn-tied", "qwen2", "Qwen2ForCausalLM", LONG | rope(YARN) | {
        "tie_word_embeddings": True}),
    Case("qwen2vl", "qwen2vl", "Qwen2ForCausalLM", RMS, {
        "extra": {"rope.dimension_sections": [4, 6, 6, 0]}}),  # of text all axes are the same
    Case("qwen3", "qwen3", "Qwen3ForCausalLM", RMS | {"head_dim": 64}),
    Case("qwen3moe", "qwen3moe", "Qwen3MoeForCausalLM", RMS | {
        "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
        "norm_topk_prob": True}),
    Case("phi2", "phi2", "PhiForCausalLM", {"layer_norm_eps": 0.01}, {"fuse_qkv": True}),
    Case("phi2-split", "phi2", "PhiForCausalLM", {"layer_norm_eps": 0.01}),
    Case("phi3", "phi3", "Phi3ForCausalLM", RMS | {"sliding_window": 7}),
    Case("phi3-partial", "phi3", "Phi3ForCausalLM", RMS | {"sliding_window": None} | rope(
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75})),
    Case("phi3-longrope-short", "phi3", "Phi3ForCausalLM", RMS | longrope(64)),
    Case("phi3-longrope-long", "phi3", "Phi3ForCausalLM", RMS | longrope(32)),
    Case("starcoder2", "starcoder2", "Starcoder2ForCausalLM", {
        "norm_epsilon": 0.01, "sliding_window": 7, "tie_word_embeddings": True}),
    Case("gemma", "gemma", "GemmaForCausalLM", GEMMA),
    Case("gemma2", "gemma2", "Gemma2ForCausalLM", GEMMA2),
    Case("gemma2-deep", "gemma2", "Gemma2ForCausalLM", GEMMA2 | DEEP | {"num_hidden_layers": 46}),
    Case("gemma3", "gemma3", "Gemma3ForCausalLM", GEMMA3 | rope({
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}})),
    Case("gemma3-deep", "gemma3", "Gemma3ForCausalLM", GEMMA3 | DEEP | {"num_hidden_layers": 62}),
    Case("granite", "granite", "GraniteForCausalLM", RMS | {
        "attention_multiplier": 0.3, "embedding_multiplier": 2.5, "residual_multiplier": 0.6,
        "logits_scaling": 1.7}),
    Case("olmo2", "olmo2", "Olmo2ForCausalLM", RMS),
    Case("smollm3", "smollm3", "SmolLM3ForCausalLM", RMS),
]  # fmt: skip


def build(case: Case) -> Any:
    """The model with every weight, norm and bias random, and large enough to matter."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(sum(map(ord, case.name)))
    kind = getattr(transformers, case.model)
    model = kind(kind.config_class(**copy.deepcopy(SIZES | case.config))).eval().float()
    gemma = case.architecture.startswith("gemma")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.3)
            elif "norm" in name:
                weight.uniform_(-0.5, 0.5).add_(0.0 if gemma else 1.0)
            elif "embed" in name and not gemma:
                weight.normal_(0.0, 1.0)
            else:
                # Twice the usual before an activation, so that its kinds differ.
                gain = 2.0 if re.search("gate_proj|gate_up|fc1|c_fc", name) else 1.0
                weight.normal_(0.0, gain * weight.shape[-1] ** -0.5)
    return model
