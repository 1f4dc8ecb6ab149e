"""Tiny models of every architecture of config.json, with every option in use."""

from __future__ import annotations

from typing import Any

from tiny import GEMMA, GEMMA2, GEMMA3, LLAMA3, LONG, RMS, YARN, Case, longrope, rope

LAYERS = {"num_hidden_layers": 3}
SMALL = RMS | LAYERS
NORM = LAYERS | {"layer_norm_eps": 0.01}
SLIDING, FULL = "sliding_attention", "full_attention"
MOE = {"num_local_experts": 6, "num_experts_per_tok": 2}
BIASED = {"attention_bias": True}
SWITCHED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


def scaled(**kind: Any) -> dict[str, Any]:
    return rope({"rope_theta": 10000.0} | kind)


def mixed_rope(original: int) -> dict[str, Any]:
    """Long rope as in the Phi 3.5 MoE, with two magnitudes."""
    parameters = longrope(original)["rope_parameters"] | {"short_mscale": 1.2, "long_mscale": 1.4}
    return rope(parameters)


CONFIG_CASES = [
    Case("llama-2", "llama", "LlamaForCausalLM", SMALL | {"num_key_value_heads": 4}),
    Case("llama-3", "llama", "LlamaForCausalLM", SMALL | rope(LLAMA3)),
    Case("llama-all-biased", "llama", "LlamaForCausalLM", SMALL | BIASED | {
        "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}),
    Case("llama-far", "llama", "LlamaForCausalLM", SMALL | scaled(rope_type="linear", factor=3.0)),
    Case("llama-dynamic-near", "llama", "LlamaForCausalLM", SMALL | {
        "max_position_embeddings": 64} | scaled(rope_type="dynamic", factor=4.0)),
    Case("llama-dynamic-far", "llama", "LlamaForCausalLM", SMALL | {
        "max_position_embeddings": 16} | scaled(rope_type="dynamic", factor=4.0), context=40),
    Case("llama-yarn-default", "llama", "LlamaForCausalLM", LONG | LAYERS | rope(YARN)),
    Case("llama-yarn-set", "llama", "LlamaForCausalLM", SMALL | rope(YARN | {
        "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0})),
    Case("llama-yarn-mscale", "llama", "LlamaForCausalLM", LONG | LAYERS | rope(YARN | {
        "mscale": 2.0, "mscale_all_dim": 0.5})),
    Case("mistral-window", "llama", "MistralForCausalLM", SMALL | {
        "sliding_window": 7, "head_dim": 64}),
    Case("mixtral-window", "llama", "MixtralForCausalLM", SMALL | MOE | {"sliding_window": 7}),
    Case("qwen2.5", "qwen2", "Qwen2ForCausalLM", SMALL),
    Case("qwen2-windows", "qwen2", "Qwen2ForCausalLM", SMALL | SWITCHED | {
        "tie_word_embeddings": True}),
    Case("qwen3-windows", "qwen3", "Qwen3ForCausalLM", SMALL | SWITCHED | BIASED | {
        "head_dim": 64}),
    Case("qwen3-moe", "qwen3moe", "Qwen3MoeForCausalLM", SMALL | {
        "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
        "norm_topk_prob": True}),
    Case("qwen3-moe-mixed", "qwen3moe", "Qwen3MoeForCausalLM", SMALL | {
        "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 4}),
    Case("phi-2", "phi2", "PhiForCausalLM", NORM | {"partial_rotary_factor": 0.5}),
    Case("phi-normed", "phi2", "PhiForCausalLM", NORM | {"qk_layernorm": True}),
    Case("phi-3", "phi3", "Phi3ForCausalLM", SMALL | {"sliding_window": 7}),
    Case("phi-4-partial", "phi3", "Phi3ForCausalLM", SMALL | rope(
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75})),
    Case("phi-3-short", "phi3", "Phi3ForCausalLM", SMALL | longrope(64)),
    Case("phi-3-long", "phi3", "Phi3ForCausalLM", SMALL | longrope(32)),
    Case("phi-3.5-moe", "phi3.5moe", "PhimoeForCausalLM", SMALL | MOE | BIASED | {
        "router_jitter_noise": 0.3, "lm_head_bias": True, "sliding_window": 7}),
    Case("phi-3.5-moe-short", "phi3.5moe", "PhimoeForCausalLM", SMALL | MOE | {
        "router_jitter_noise": 0.3} | mixed_rope(64)),
    Case("phi-3.5-moe-long", "phi3.5moe", "PhimoeForCausalLM", SMALL | MOE | {
        "router_jitter_noise": 0.3} | mixed_rope(32), {"rope_for_prompt": True}),
    Case("starcoder2-3b", "starcoder2", "Starcoder2ForCausalLM", LAYERS | {
        "norm_epsilon": 0.01, "sliding_window": 7, "num_hidden_layers": 4}),
    Case("starcoder2-plain", "starcoder2", "Starcoder2ForCausalLM", LAYERS | {
        "norm_epsilon": 0.01, "use_bias": False, "tie_word_embeddings": False}),
    Case("gemma-2b", "gemma", "GemmaForCausalLM", GEMMA | LAYERS),
    Case("gemma-2", "gemma2", "Gemma2ForCausalLM", GEMMA2 | LAYERS | {
        "query_pre_attn_scalar": 24}),
    Case("gemma-3", "gemma3", "Gemma3ForCausalLM", GEMMA3 | LAYERS | {
        "layer_types": [SLIDING, FULL, SLIDING], "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 3.0} | rope({
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}})),
    Case("granite-3", "granite", "GraniteForCausalLM", SMALL | {
        "attention_multiplier": 0.3, "embedding_multiplier": 2.5, "residual_multiplier": 0.6,
        "logits_scaling": 1.7}),
    Case("olmo-2", "olmo2", "Olmo2ForCausalLM", SMALL),
    Case("cohere-r", "cohere", "CohereForCausalLM", NORM | {"logit_scale": 0.3}),
    Case("cohere-r-plus", "cohere", "CohereForCausalLM", NORM | {
        "logit_scale": 0.3, "use_qk_norm": True, "attention_bias": True}),
    Case("cohere-r7b", "cohere2", "Cohere2ForCausalLM", NORM | {
        "logit_scale": 0.3, "sliding_window": 7, "layer_types": [SLIDING, SLIDING, FULL]}),
    Case("stablelm-3b", "stablelm", "StableLmForCausalLM", NORM | {"use_qkv_bias": True}),
    Case("stablelm-12b", "stablelm", "StableLmForCausalLM", NORM | {
        "qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5}),
    Case("glm-4-9b", "glm", "GlmForCausalLM", SMALL | {"head_dim": 32}),
    Case("glm-4-0414", "glm4", "Glm4ForCausalLM", SMALL | {
        "head_dim": 32, "attention_bias": False}),
    Case("smollm3-nope", "smollm3", "SmolLM3ForCausalLM", RMS),
    Case("smollm3-windows", "smollm3", "SmolLM3ForCausalLM", SMALL | {
        "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7}),
]  # fmt: skip
