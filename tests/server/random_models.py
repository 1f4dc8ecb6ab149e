"""Small models of random weights, whose answers are bytes that mean nothing."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
Q8 = gguf.GGMLQuantizationType.Q8_0


def write_random(path: Path, seed: int = 1, *, layers: int = 2, hidden: int = 64) -> Path:
    """A GGUF file; one layer takes about 13 * hidden**2 bytes."""
    random, heads, most = np.random.default_rng(seed), hidden // 32, 4 * hidden
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(c) for c in codes] + [chr(256 + i) for i in range(256 - len(codes))]
    tokens = [*alphabet, "ab", *(f"filler{i}" for i in range(29)), "<|begin|>", "<|end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(most)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 286 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(286)
    writer.add_eos_token_id(287)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (288, hidden), "output": (288, hidden)}
    for i in range(layers):
        names = ["attn_q", "attn_k", "attn_v", "attn_output"]
        shapes |= {f"blk.{i}.{name}": (hidden, hidden) for name in names}
        up, down = (most, hidden), (hidden, most)
        shapes |= {f"blk.{i}.ffn_gate": up, f"blk.{i}.ffn_up": up, f"blk.{i}.ffn_down": down}
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for name, (rows, columns) in shapes.items():
        blocks = random.integers(0, 256, (rows, columns // 32, 34), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=Q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
