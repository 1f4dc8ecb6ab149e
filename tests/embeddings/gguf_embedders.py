"""Models that embed -> GGUF files, by the rules of llama.cpp's converter; names are gguf-py's."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file
from tiny_embedders import SPECIAL, WORDS

_POOLING = {
    "mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS, "last": gguf.PoolingType.LAST,
    "rank": gguf.PoolingType.RANK,
}  # fmt: skip


_ARCHITECTURES = {"nomic_bert": "NOMIC_BERT", "modernbert": "MODERN_BERT"}
_WITH_OFFSET = ("roberta", "xlm-roberta")
_OWN = re.compile(r"(bert|roberta|distilbert|model)\.")


def write_bert(
    model: Any,
    path: Path,
    pooling: str | None,
    kind: str = "F32",
    extra: dict[str, Any] | None = None,
) -> None:
    """kind: of matrices but the tables of positions and types. extra: of the tokenizer."""
    c = model.config
    arch = gguf.MODEL_ARCH[_ARCHITECTURES.get(c.model_type, "BERT")]
    offset = c.pad_token_id + 1 if c.model_type in _WITH_OFFSET else 0  # which is cut off
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings - offset)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(getattr(c, "hidden_dim", None) or c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    eps = (getattr(c, name, None) for name in ("layer_norm_eps", "norm_eps"))
    writer.add_layer_norm_eps(next(filter(None, eps), 1e-12))
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(_POOLING[pooling])
    if c.model_type in _ARCHITECTURES:
        rope = c.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if c.model_type == "modernbert":
        writer.add_rope_freq_base_swa(c.rope_parameters["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(c.local_attention)
        writer.add_sliding_window_pattern(3)
    if extra is None:
        _vocabulary(writer)
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    for name, values in _tensors(model).items():
        plain = _OWN.sub("", name, count=1) if _OWN.match(name) else name
        if plain.startswith("pooler.") or plain.endswith("_ids"):
            continue
        if c.model_type in ("bert", "modernbert"):
            plain = plain.replace("classifier.", "classifier.out_proj.")
        if "position_embeddings" in plain:
            values = values[offset:]
        kept = values.ndim < 2 or "position" in plain or "token_type" in plain
        _add(writer, names.get_name(plain, (".weight", ".bias")), values, "F32" if kept else kind)
    _finish(writer)


def _tensors(model: Any) -> dict[str, Any]:
    """By the names that its authors' files have."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found: dict[str, Any] = load_file(f"{folder}/model.safetensors")
    return found


def _vocabulary(writer: Any) -> None:
    """Marks before words in place of those before what goes on with one."""
    types = [gguf.TokenType.CONTROL if word in SPECIAL else gguf.TokenType.NORMAL for word in WORDS]
    words = [
        word if word in SPECIAL else word[2:] if word.startswith("##") else f"▁{word}"
        for word in WORDS
    ]
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_unk_token_id(WORDS.index("[UNK]"))
    writer.add_sep_token_id(WORDS.index("[SEP]"))
    writer.add_pad_token_id(WORDS.index("[PAD]"))
    writer.add_mask_token_id(WORDS.index("[MASK]"))


def _add(writer: Any, name: str, values: Any, kind: str) -> None:
    raw = gguf.GGMLQuantizationType[kind]
    data = np.ascontiguousarray(values, np.float32)
    writer.add_tensor(name, data if kind == "F32" else quantize(data, raw), raw_dtype=raw)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
