"""Models that embed -> GGUF files, by the rules of llama.cpp's converter; names are gguf-py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from tiny_embedders import SPECIAL, WORDS

_POOLING = {
    "mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS, "last": gguf.PoolingType.LAST,
}  # fmt: skip


def write_bert(model: Any, path: Path, pooling: str, kind: str = "F32") -> None:
    """kind: of matrices but the tables of positions and types."""
    c, offset = model.config, 0
    if c.model_type != "bert":  # positions of padding are cut off
        offset = c.pad_token_id + 1
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings - offset)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_layer_norm_eps(c.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(_POOLING[pooling])
    _vocabulary(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name.startswith("pooler.") or name.endswith("_ids"):
            continue
        new = names.get_name(name, (".weight", ".bias"))
        values = weight.detach().numpy()[offset if "position_embeddings" in name else 0 :]
        kept = values.ndim < 2 or "position" in name or "token_type" in name
        _add(writer, new, values, "F32" if kept else kind)
    _finish(writer)


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
