"""A tiny Llama with a tokenizer of bytes, and LoRA adapters for it, as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Floats = NDArray[np.float32]
VOCAB, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 300, 64, 96, 2, 4, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
    "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
KV = WIDTH // HEADS * KV_HEADS
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KV, WIDTH),
    "self_attn.v_proj": (KV, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
RANK, ALPHA = 4, 8
PREFIX = "base_model.model."


def write_base(folder: Path, merged: Mapping[Path, float] | None = None) -> Path:
    """The model, with adapters merged into its weights, each multiplied by a weight of its own."""
    rng = np.random.default_rng(5)

    def random(*shape: int) -> Floats:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5 * 1.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": random(VOCAB, WIDTH) * 8}
    tensors["lm_head.weight"] = random(VOCAB, WIDTH)
    tensors["model.norm.weight"] = np.ones(WIDTH, np.float32)
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        for name, shape in LINEARS.items():
            tensors[f"{stem}.{name}.weight"] = random(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{norm}.weight"] = np.ones(WIDTH, np.float32)
    for adapter, weight in (merged or {}).items():
        found = load_file(adapter / "adapter_model.safetensors")
        for name in found:
            if ".lora_A." in name:
                a, b = found[name], found[name.replace("lora_A", "lora_B")]
                at = name.removeprefix(PREFIX).replace(".lora_A", "")
                change = ALPHA / RANK * weight * (b.astype(np.float64) @ a)
                tensors[at] = (tensors[at] + change).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    _write_tokenizer(folder)
    return folder


def write_adapter(
    folder: Path,
    seed: int,
    modules: Sequence[str] = tuple(LINEARS),
    *,
    sizes: Mapping[str, tuple[int, int]] = LINEARS,
    layers: int = LAYERS,
    size: float = 0.2,
) -> Path:
    """An adapter that changes much, also in the place of what is there.

    sizes: of the base's linears, rows and columns. size: of the numbers.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for name in modules:
            rows, cols = sizes[name]
            for part, shape in (("A", (RANK, cols)), ("B", (rows, RANK))):
                at = f"{PREFIX}model.layers.{layer}.{name}.lora_{part}.weight"
                tensors[at] = (rng.standard_normal(shape) * size).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "new.safetensors"  # as the old one may be mapped
    save_file(tensors, new)
    new.rename(folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
        "r": RANK, "lora_alpha": ALPHA, "bias": "none", "fan_in_fan_out": False,
        "target_modules": [name.rpartition(".")[2] for name in modules],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    library = Tokenizer(models.BPE(vocab, []))
    library.add_special_tokens(["<s>", "</s>"])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
