"""The config.json of popular repositories, keys and values spelled as published.

`reduced` makes the sizes tiny and keeps their proportions. Keys that all files of a family have are
written once.
"""

from __future__ import annotations

import copy
from typing import Any

Json = dict[str, Any]

LAYERS = 3
OF_LAYERS = {"layer_types", "no_rope_layers"}
SMALL = {
    "vocab_size": 128, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def reduced(config: Json) -> Json:
    """The same model with few and narrow layers."""
    small = copy.deepcopy(config)
    if "text_config" in small:
        inner = small["text_config"] = reduced(small["text_config"])
        return small | {key: inner[key] for key in ("vocab_size", "hidden_size") if key in small}
    small |= {key: size for key, size in SMALL.items() if key in small or key == "vocab_size"}
    heads, shared = small.get("num_attention_heads"), small.get("num_key_value_heads")
    wide = small.get("head_dim") and heads and small["head_dim"] * heads != small["hidden_size"]
    small |= {"num_hidden_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4}
    if shared is not None:
        small["num_key_value_heads"] = {1: 1, heads: 4}.get(shared, 2)
    if heads is None:  # a file of differences from a class whose sizes are not tiny
        small |= {"head_dim": 32, "num_key_value_heads": 2}
    elif small.get("head_dim"):
        small["head_dim"] = 32 if wide else 16
    return small | words(small)


def words(small: Json) -> Json:
    """What else has to follow the sizes."""
    changed: Json = {key: small[key] and 0 for key in small if key.endswith("_token_id")}
    changed |= {key: small[key] and small[key][-LAYERS:] for key in OF_LAYERS & small.keys()}
    if small.get("sliding_window"):
        changed["sliding_window"] = 7
    if small.get("use_sliding_window"):
        changed["max_window_layers"] = 1
    if isinstance(scaling := small.get("rope_scaling"), dict):
        dims = int((small.get("head_dim") or 16) * small.get("partial_rotary_factor", 1.0))
        lists = {key: scaling[key][: dims // 2] for key in scaling if key.endswith("_factor")
                 and isinstance(scaling[key], list)}  # fmt: skip
        changed["rope_scaling"] = scaling | lists
    return changed


def of(architecture: str, model_type: str, version: str, **keys: Any) -> Json:
    """What every file has."""
    return {
        "architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16",
        "transformers_version": version, "use_cache": True, "initializer_range": 0.02,
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "bos_token_id": 1, "eos_token_id": 2,
    } | keys  # fmt: skip


def llama(version: str, **keys: Any) -> Json:
    own = {"hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05}
    return of("LlamaForCausalLM", "llama", version, **own | keys)


def mistral(version: str, **keys: Any) -> Json:
    own = {
        "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "num_key_value_heads": 8, "intermediate_size": 14336,
    }  # fmt: skip
    return of("MistralForCausalLM", "mistral", version, **own | keys)


def qwen2(version: str, **keys: Any) -> Json:
    own = {
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "max_position_embeddings": 32768, "max_window_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_sliding_window": False,
    }  # fmt: skip
    return of("Qwen2ForCausalLM", "qwen2", version, **own | keys)


def qwen3(version: str = "4.51.0", **keys: Any) -> Json:
    own = {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 40960, "max_window_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    }  # fmt: skip
    return of("Qwen3ForCausalLM", "qwen3", version, **own | keys)


def phi3(version: str, **keys: Any) -> Json:
    own = {
        "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "max_position_embeddings": 4096, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
    }  # fmt: skip
    return of("Phi3ForCausalLM", "phi3", version, **own | keys)


def gemma2(**keys: Any) -> Json:
    own = {
        "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 2304,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096,
    }  # fmt: skip
    return of("Gemma2ForCausalLM", "gemma2", "4.42.0.dev0", **own | keys)


def phi(version: str, **keys: Any) -> Json:
    own = {
        "attention_dropout": 0.0, "bos_token_id": None, "embd_pdrop": 0.0, "eos_token_id": None,
        "hidden_act": "gelu_new", "hidden_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "num_key_value_heads": None,
        "partial_rotary_factor": 0.5, "qk_layernorm": False, "resid_pdrop": 0.0,
        "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "vocab_size": 51200,
    }  # fmt: skip
    return of("PhiForCausalLM", "phi", version, **own | keys)


def cohere(**keys: Any) -> Json:
    own = {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5,
        "eos_token_id": 255001, "hidden_act": "silu", "hidden_size": 8192,
        "layer_norm_eps": 1e-05, "logit_scale": 0.0625, "max_position_embeddings": 8192,
        "model_max_length": 131072, "num_attention_heads": 64, "num_key_value_heads": 64,
        "pad_token_id": 0, "pretraining_tp": 1, "rope_theta": 8000000.0, "use_qk_norm": False,
        "vocab_size": 256000,
    }  # fmt: skip
    return of("CohereForCausalLM", "cohere", "4.38.2", **own | keys)


def granite(**keys: Any) -> Json:
    own = {
        "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.0078125,
        "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu",
        "logits_scaling": 16.0, "max_position_embeddings": 4096, "mlp_bias": False,
        "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000,
        "tie_word_embeddings": True, "vocab_size": 49155,
    }  # fmt: skip
    return of("GraniteForCausalLM", "granite", "4.46.0.dev0", **own | keys)


def glm(architecture: str, model_type: str, **keys: Any) -> Json:
    own = {
        "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": [151329, 151336],
        "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 32768,
        "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "vocab_size": 151552,
    }  # fmt: skip
    return of(architecture, model_type, "4.52.0.dev0", **own | keys)


TP = {"pretraining_tp": 1}
NO_SCALING = {"rope_scaling": None, "tie_word_embeddings": False}
LLAMA3 = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "num_key_value_heads": 8, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "vocab_size": 128256,
} | TP | NO_SCALING  # fmt: skip
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 131072, "mlp_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
LLAMA32 = LLAMA31 | {
    "head_dim": 64, "hidden_size": 2048, "tie_word_embeddings": True,
    "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0},
}  # fmt: skip
NANOTRON = {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None}
LONG = [1.05 + 0.3 * i for i in range(64)]
SHORT = [1.0 + 0.05 * i for i in range(64)]
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1,
    "head_dim": 256, "hidden_size": 2048, "max_position_embeddings": 8192,
    "num_attention_heads": 8, "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
}  # fmt: skip
GEMMA3 = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152, "max_position_embeddings": 32768, "num_attention_heads": 4,
    "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "vocab_size": 262144,
}  # fmt: skip
STABLE = {
    "hidden_act": "silu", "layer_norm_eps": 1e-05, "max_position_embeddings": 4096,
    "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000,
    "tie_word_embeddings": False, "use_qkv_bias": False, "vocab_size": 50304,
}  # fmt: skip
MIXTRAL = {
    "attention_dropout": 0.0, "hidden_act": "silu", "max_position_embeddings": 32768,
    "num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8,
    "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
STARCODER = {
    "activation_function": "gelu", "attention_dropout": 0.1, "attention_softmax_in_fp32": True,
    "embedding_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-05,
    "norm_type": "layer_norm", "num_key_value_heads": 2, "residual_dropout": 0.1,
    "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True, "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
}  # fmt: skip
PHIMOE = {
    "attention_bias": True, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phimoe.PhiMoEConfig",
        "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
    },
    "eos_token_id": 32000, "hidden_act": "silu", "hidden_dropout": 0.0,
    "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True,
    "max_position_embeddings": 131072, "num_experts_per_tok": 2, "num_key_value_heads": 8,
    "num_local_experts": 16, "original_max_position_embeddings": 4096,
    "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": LONG, "short_factor": SHORT, "long_mscale": 1.243163121016122,
        "short_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
        "type": "longrope",
    },
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01,
    "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 32064,
}  # fmt: skip
QWEN3_MOE = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
OLMO2 = {
    "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
    "hidden_act": "silu", "max_position_embeddings": 4096, "num_key_value_heads": 32,
    "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
    "tie_word_embeddings": False, "vocab_size": 100352,
}  # fmt: skip
SMOLLM3 = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
    "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048,
    "layer_types": [FULL] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
    "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16, "num_key_value_heads": 4, "pad_token_id": 128012,
    "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
    "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
COHERE2 = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5,
    "cache_implementation": "hybrid", "eos_token_id": 255001, "head_dim": 128,
    "hidden_act": "silu", "layer_norm_eps": 1e-05, "layer_switch": 4, "logit_scale": 0.25,
    "max_position_embeddings": 8192, "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first", "pad_token_id": 0,
    "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000,
    "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4,
    "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
    "use_parallel_embedding": True, "vocab_size": 256000,
}  # fmt: skip

PUBLISHED: dict[str, Json] = {
    "huggyllama/llama-7b": llama("4.28.1", max_position_embeddings=2048,
        max_sequence_length=2048, pad_token_id=0, rms_norm_eps=1e-06, torch_dtype="float16",
        tie_word_embeddings=False),
    "meta-llama/Llama-2-7b-hf": llama("4.31.0.dev0", num_key_value_heads=32, **TP, **NO_SCALING),
    "meta-llama/Llama-2-7b-chat-hf": llama("4.32.0.dev0", num_key_value_heads=32, **TP,
        **NO_SCALING, torch_dtype="float16"),
    "codellama/CodeLlama-7b-hf": llama("4.32.0.dev0", max_position_embeddings=16384,
        num_key_value_heads=32, rope_theta=1000000, vocab_size=32016, **TP, **NO_SCALING),
    "lmsys/vicuna-7b-v1.5": llama("4.31.0", _name_or_path="vicuna-7b-v1.5", pad_token_id=0,
        num_key_value_heads=32, **TP, **NO_SCALING),
    "lmsys/longchat-7b-v1.5-32k": llama("4.31.0", num_key_value_heads=32, pad_token_id=0, **TP,
        tie_word_embeddings=False, rope_scaling={"factor": 8.0, "type": "linear"}),
    "NousResearch/Yarn-Llama-2-7b-128k (rope as transformers spells it)": llama("4.40.0",
        max_position_embeddings=131072, num_key_value_heads=32, **TP, tie_word_embeddings=False,
        rope_scaling={"factor": 32.0, "original_max_position_embeddings": 4096, "type": "yarn",
                      "finetuned": True}),
    "a dynamic scaling of 2023": llama("4.31.0", num_key_value_heads=32, **TP,
        tie_word_embeddings=False, rope_scaling={"factor": 2.0, "type": "dynamic"}),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": llama("4.35.0", attention_bias=False,
        max_position_embeddings=2048, num_key_value_heads=4, hidden_size=2048, rope_theta=10000.0,
        **TP, **NO_SCALING),
    "meta-llama/Meta-Llama-3-8B": llama("4.40.0.dev0", **LLAMA3),
    "meta-llama/Llama-3.1-8B-Instruct": llama("4.42.3", **LLAMA31),
    "meta-llama/Llama-3.2-1B": llama("4.45.0.dev0", **LLAMA32),
    "unsloth/Llama-3.2-1B-Instruct": llama("4.45.0.dev0", **LLAMA32 | {
        "_name_or_path": "meta-llama/Llama-3.2-1B-Instruct", "pad_token_id": 128004,
        "unsloth_fixed": True}),
    "NousResearch/Hermes-3-Llama-3.1-8B": llama("4.43.3", **LLAMA31 | {
        "_name_or_path": "output/model", "eos_token_id": 128040, "use_cache": False}),
    "cognitivecomputations/dolphin-2.9-llama3-8b": llama("4.40.0", **LLAMA3 | {
        "_name_or_path": "meta-llama/Meta-Llama-3-8B", "eos_token_id": 128256,
        "vocab_size": 128258, "use_cache": False}),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": llama("4.43.0.dev0", **LLAMA31 | {
        "eos_token_id": 128001}),
    "deepseek-ai/deepseek-coder-6.7b-base": llama("4.34.1", bos_token_id=32013,
        max_position_embeddings=16384, num_key_value_heads=32, rms_norm_eps=1e-06, **TP,
        eos_token_id=32014, rope_theta=100000, tie_word_embeddings=False, vocab_size=32256,
        rope_scaling={"factor": 4.0, "type": "linear"}),
    "deepseek-ai/deepseek-llm-7b-base": llama("4.33.1", bos_token_id=100000,
        eos_token_id=100001, num_key_value_heads=32, rms_norm_eps=1e-06, rope_theta=10000.0,
        vocab_size=102400, **TP, **NO_SCALING),
    "01-ai/Yi-6B": llama("4.34.0", num_key_value_heads=4, pad_token_id=0, rope_theta=5000000.0,
        rms_norm_eps=1e-05, tie_word_embeddings=False, vocab_size=64000),
    "01-ai/Yi-1.5-9B-Chat": llama("4.40.0", attention_bias=False, attention_dropout=0.0,
        num_key_value_heads=4, pad_token_id=0, rms_norm_eps=1e-06, rope_theta=5000000.0,
        use_cache=False, vocab_size=64000, **TP, **NO_SCALING),
    "upstage/SOLAR-10.7B-v1.0": llama("4.35.2", num_key_value_heads=8, rope_theta=10000.0,
        use_cache=False, torch_dtype="float16", **TP, **NO_SCALING),
    "HuggingFaceTB/SmolLM-135M": llama("4.39.3", attention_bias=False, hidden_size=576,
        max_position_embeddings=2048, num_attention_heads=9, num_key_value_heads=3, **TP,
        rope_scaling=None, rope_theta=10000.0, tie_word_embeddings=True, vocab_size=49152),
    "HuggingFaceTB/SmolLM2-135M": llama("4.40.1", attention_bias=False, hidden_size=576,
        initializer_range=0.041666666666666664, max_position_embeddings=8192, **TP,
        num_attention_heads=9, num_key_value_heads=3, rope_theta=100000, vocab_size=49152,
        tie_word_embeddings=True, **NANOTRON),
    "HuggingFaceTB/SmolLM2-135M-Instruct": llama("4.42.3", hidden_size=576, mlp_bias=False,
        num_attention_heads=9, num_key_value_heads=3, rope_theta=100000, pad_token_id=2, **TP,
        max_position_embeddings=8192, vocab_size=49152, tie_word_embeddings=True, **NANOTRON,
        **{"transformers.js_config": {"kv_cache_dtype": {
            "q4f16": "float16", "fp16": "float16"}}}),
    "tiiuae/Falcon3-1B-Instruct": llama("4.46.1", activation="swiglu", attention_bias=False,
        attention_dropout=0.0, eos_token_id=11, head_dim=256, hidden_size=2048, mlp_bias=False,
        num_attention_heads=8, num_key_value_heads=4, rope_theta=1000042,
        max_position_embeddings=8192, rms_norm_eps=1e-06, vocab_size=131072, **TP, **NO_SCALING),
    "allenai/Llama-3.1-Tulu-3-8B": llama("4.43.4", **LLAMA31 | {
        "_name_or_path": "/model", "pad_token_id": 128256, "vocab_size": 128264,
        "use_cache": True}),
    "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF": llama("4.44.0", **LLAMA31),
    "a merge by mergekit": llama("4.47.1", **LLAMA31 | {
        "_name_or_path": "one/model", "rope_type": "llama3"}),
    "a fine-tune saved by transformers 5": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "dtype": "bfloat16", "eos_token_id": 128001, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pad_token_id": None, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "transformers_version": "5.0.0",
        "rope_parameters": LLAMA31["rope_scaling"] | {"rope_theta": 500000.0},
        "use_cache": False, "vocab_size": 128256},
    "mistralai/Mistral-7B-v0.1": mistral("4.34.0.dev0"),
    "mistralai/Mistral-7B-Instruct-v0.2": mistral("4.36.0", attention_dropout=0.0,
        rope_theta=1000000.0, sliding_window=None),
    "mistralai/Mistral-7B-Instruct-v0.3": mistral("4.42.0.dev0", attention_dropout=0.0,
        rope_theta=1000000.0, sliding_window=None, vocab_size=32768),
    "mistralai/Mistral-Nemo-Instruct-2407": mistral("4.43.0.dev0", attention_dropout=0.0,
        head_dim=128, hidden_size=5120, max_position_embeddings=131072, rope_theta=1000000.0,
        sliding_window=None, vocab_size=131072),
    "mistralai/Mistral-Small-24B-Instruct-2501": mistral("4.49.0.dev0", attention_dropout=0.0,
        head_dim=128, hidden_size=5120, rope_theta=100000000.0, sliding_window=None,
        vocab_size=131072),
    "HuggingFaceH4/zephyr-7b-beta": mistral("4.35.0", pad_token_id=2,
        _name_or_path="mistralai/Mistral-7B-v0.1"),
    "openchat/openchat-3.5-0106": mistral("4.36.1", eos_token_id=32000, use_cache=True,
        max_position_embeddings=8192, vocab_size=32002, attention_dropout=0.0),
    "teknium/OpenHermes-2.5-Mistral-7B": mistral("4.34.0.dev0", eos_token_id=32000,
        _name_or_path="mistralai/Mistral-7B-v0.1", use_cache=False, vocab_size=32002),
    "cognitivecomputations/dolphin-2.6-mistral-7b": mistral("4.37.0.dev0", eos_token_id=32000,
        attention_dropout=0.0, use_cache=False, vocab_size=32001),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": of("MixtralForCausalLM", "mixtral", "4.36.0.dev0",
        **MIXTRAL),
    "mistralai/Mixtral-8x22B-v0.1": of("MixtralForCausalLM", "mixtral", "4.38.0", **MIXTRAL | {
        "max_position_embeddings": 65536, "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0, "vocab_size": 32000}),
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": of("MixtralForCausalLM", "mixtral",
        "4.37.0.dev0", **MIXTRAL | {"eos_token_id": 32000, "vocab_size": 32002,
        "_name_or_path": "NousResearch/Nous-Hermes-2-Mixtral-8x7B-SFT", "use_cache": False}),
    "Qwen/Qwen1.5-0.5B-Chat": qwen2("4.37.0", max_window_layers=21, hidden_size=1024,
        num_attention_heads=16, num_key_value_heads=16, sliding_window=32768,
        tie_word_embeddings=True),
    "Qwen/Qwen2-0.5B-Instruct": qwen2("4.40.1", max_window_layers=24, hidden_size=896,
        num_attention_heads=14, num_key_value_heads=2, sliding_window=32768,
        tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": qwen2("4.43.1"),
    "Qwen/Qwen2.5-7B-Instruct with YaRN": qwen2("4.43.1", rope_scaling={"factor": 4.0,
        "original_max_position_embeddings": 32768, "type": "yarn"}),
    "Qwen/Qwen2.5-Coder-0.5B": qwen2("4.45.2", max_window_layers=24, num_key_value_heads=2,
        hidden_size=896, num_attention_heads=14, tie_word_embeddings=True, rope_scaling=None,
        sliding_window=None),
    "Qwen/Qwen2.5-Math-1.5B": qwen2("4.44.0", max_window_layers=21, use_mrope=False,
        max_position_embeddings=4096, rope_theta=10000, sliding_window=4096,
        tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct-1M": qwen2("4.47.1", max_position_embeddings=1010000,
        rope_theta=10000000.0, sliding_window=32768, dual_chunk_attention_config={
            "chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}),
    "Qwen/QwQ-32B": qwen2("4.43.1", max_window_layers=64, sliding_window=32768),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": qwen2("4.44.0", use_mrope=False,
        max_position_embeddings=131072, max_window_layers=21, rope_theta=10000,
        sliding_window=4096),
    "Qwen/Qwen3-0.6B": qwen3(hidden_size=1024, num_attention_heads=16, max_window_layers=28),
    "Qwen/Qwen3-8B": qwen3(tie_word_embeddings=False),
    "Qwen/Qwen3-8B with YaRN": qwen3(tie_word_embeddings=False, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": qwen3(tie_word_embeddings=False,
        max_position_embeddings=131072, rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
            "attn_factor": 0.8782488562869419}),
    "Qwen/Qwen3-30B-A3B": of("Qwen3MoeForCausalLM", "qwen3_moe", "4.51.0", **QWEN3_MOE),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": of("Qwen3MoeForCausalLM", "qwen3_moe", "4.52.3",
        **QWEN3_MOE | {"max_position_embeddings": 262144, "max_window_layers": 28, "qkv_bias":
        False, "rope_theta": 10000000, "shared_expert_intermediate_size": 0, "use_qk_norm": True}),
    "microsoft/phi-1_5": phi("4.37.0"),
    "microsoft/phi-2": phi("4.37.0", hidden_size=2560, partial_rotary_factor=0.4,
        bos_token_id=50256, eos_token_id=50256, resid_pdrop=0.1, num_key_value_heads=32,
        torch_dtype="float16"),
    "microsoft/Phi-3-mini-4k-instruct": phi3("4.40.2"),
    "microsoft/Phi-3-mini-128k-instruct": phi3("4.40.2", max_position_embeddings=131072,
        sliding_window=262144, rope_scaling={
            "long_factor": LONG, "short_factor": SHORT, "type": "longrope"}),
    "microsoft/Phi-3.5-mini-instruct": phi3("4.43.3", max_position_embeddings=131072,
        sliding_window=262144, rope_scaling={
            "long_factor": LONG, "short_factor": SHORT, "type": "longrope"}),
    "microsoft/phi-4": phi3("4.47.0", auto_map={}, bos_token_id=100257, eos_token_id=100265,
        hidden_size=5120, max_position_embeddings=16384, num_key_value_heads=10,
        num_attention_heads=40, original_max_position_embeddings=16384, rope_theta=250000,
        pad_token_id=100349, sliding_window=None, vocab_size=100352),
    "microsoft/Phi-4-mini-instruct": phi3("4.45.0", bos_token_id=199999, eos_token_id=199999,
        full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
        max_position_embeddings=131072, num_attention_heads=24, num_key_value_heads=8,
        pad_token_id=199999, partial_rotary_factor=0.75, sliding_window=262144,
        tie_word_embeddings=True, vocab_size=200064, rope_scaling={
            "long_factor": LONG, "short_factor": SHORT, "type": "longrope"}),
    "microsoft/Phi-3.5-MoE-instruct": of("PhiMoEForCausalLM", "phimoe", "4.43.3", **PHIMOE),
    "bigcode/starcoder2-3b": of("Starcoder2ForCausalLM", "starcoder2", "4.37.0.dev0",
        **STARCODER),
    "bigcode/starcoder2-7b": of("Starcoder2ForCausalLM", "starcoder2", "4.37.0.dev0",
        **STARCODER | {"num_key_value_heads": 4, "rope_theta": 1000000}),
    "google/gemma-2b": of("GemmaForCausalLM", "gemma", "4.38.0.dev0", **GEMMA | {
        "hidden_act": "gelu", "hidden_activation": None}),
    "google/gemma-7b-it": of("GemmaForCausalLM", "gemma", "4.38.0.dev0", **GEMMA | {
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 3072}),
    "google/gemma-2-2b-it": gemma2(),
    "google/gemma-2-27b-it": gemma2(query_pre_attn_scalar=144, hidden_size=4608, head_dim=128,
        num_attention_heads=32, num_key_value_heads=16, _attn_implementation="eager"),
    "google/gemma-3-1b-it": of("Gemma3ForCausalLM", "gemma3_text", "4.50.0.dev0", **GEMMA3 | {
        "sliding_window_pattern": 6}),
    "google/gemma-3-270m": of("Gemma3ForCausalLM", "gemma3_text", "4.55.0.dev0", **GEMMA3 | {
        "_sliding_window_pattern": 6, "layer_types": [SLIDING] * 5 + [FULL],
        "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
        "use_bidirectional_attention": False}),
    "google/gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 4, "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 16, "image_size": 28, "intermediate_size": 16, "patch_size": 14,
            "model_type": "siglip_vision_model", "num_attention_heads": 2,
            "num_hidden_layers": 1, "vision_use_head": False}},
    "ibm-granite/granite-3.0-2b-instruct": granite(torch_dtype="float32"),
    "ibm-granite/granite-3.3-8b-instruct": granite(attention_dropout=0.0, rope_theta=10000000.0,
        max_position_embeddings=131072, tie_word_embeddings=True, attention_multiplier=0.0078125),
    "allenai/OLMo-2-1124-7B-Instruct": of("Olmo2ForCausalLM", "olmo2", "4.47.0.dev0", **OLMO2),
    "allenai/OLMo-2-0425-1B": of("Olmo2ForCausalLM", "olmo2", "4.51.3", **OLMO2 | {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16}),
    "CohereForAI/c4ai-command-r-v01": cohere(),
    "CohereForAI/c4ai-command-r-plus": cohere(logit_scale=0.8333333333333334,
        num_attention_heads=96, num_key_value_heads=8,
        rope_theta=75000000.0, use_qk_norm=True, hidden_size=12288),
    "CohereForAI/aya-23-8B": cohere(num_key_value_heads=8, num_attention_heads=32,
        hidden_size=4096, rope_theta=10000, model_max_length=8192, logit_scale=0.0625),
    "CohereForAI/c4ai-command-r7b-12-2024": of("Cohere2ForCausalLM", "cohere2", "4.48.0.dev0",
        **COHERE2),
    "stabilityai/stablelm-3b-4e1t": of("StableLmForCausalLM", "stablelm", "4.38.0", **STABLE),
    "stabilityai/stablelm-2-1_6b": of("StableLmForCausalLM", "stablelm", "4.38.0", **STABLE | {
        "eos_token_id": 100257, "hidden_dropout": 0.0, "num_key_value_heads": 32,
        "use_qkv_bias": True, "vocab_size": 100352}),
    "stabilityai/stablelm-2-12b": of("StableLmForCausalLM", "stablelm", "4.40.0", **STABLE | {
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "num_key_value_heads": 8,
        "qk_layernorm": True, "use_parallel_residual": True, "vocab_size": 100352}),
    "THUDM/glm-4-9b-chat-hf": glm("GlmForCausalLM", "glm", attention_bias=True,
        rms_norm_eps=1.5625e-07, max_position_embeddings=131072),
    "THUDM/GLM-4-9B-0414": glm("Glm4ForCausalLM", "glm4"),
    "THUDM/GLM-Z1-32B-0414": glm("Glm4ForCausalLM", "glm4", hidden_size=6144,
        num_attention_heads=48, num_key_value_heads=8),
    "HuggingFaceTB/SmolLM3-3B": of("SmolLM3ForCausalLM", "smollm3", "4.54.0.dev0", **SMOLLM3),
    "HuggingFaceTB/SmolLM3-3B-Base": of("SmolLM3ForCausalLM", "smollm3", "4.53.0.dev0", **SMOLLM3
        | {"_name_or_path": "x", "rope_scaling": {"factor": 2.0, "rope_type": "yarn",
           "original_max_position_embeddings": 65536}}),
}  # fmt: skip
