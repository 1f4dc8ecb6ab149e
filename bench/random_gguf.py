"""Write a GGUF file of a model's shape, all its matrices random and of one number format.

For speed and memory: arithmetic costs the same whatever the values are. Its text is noise.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from squall.quant import FORMATS, GGML_FORMATS


@dataclass(frozen=True)
class Shape:
    """A llama decoder."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocab: int


SHAPES = {
    "135m": Shape(30, 576, 1536, 9, 3, 49152),
    "1.1b": Shape(16, 2048, 8192, 32, 8, 32000),
    "tinyllama": Shape(22, 2048, 5632, 32, 4, 32000),
    "7b": Shape(32, 4096, 14336, 32, 8, 32000),
}
# The gguf package has another size for blocks of q8_1.
WRITABLE = tuple(format.name for format in GGML_FORMATS.values() if format.name != "q8_1")
ALPHABET = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 324)]]


def write(path: Path, shape: Shape, format_name: str, *, context: int = 32768) -> None:
    """One file; `format_name` is one of WRITABLE."""
    writer = gguf.GGUFWriter(path, "llama")
    _metadata(writer, shape, context)
    format = FORMATS[format_name]
    rng = np.random.default_rng(0)
    ones = np.ones(shape.hidden, np.float32)
    kv = shape.hidden // shape.heads * shape.kv_heads

    def matrix(name: str, rows: int, cols: int) -> None:
        # Any bytes are valid blocks while their floats are finite; these are small.
        data = rng.integers(0, 256, (rows, format.row_bytes(cols)), np.uint8) & 0x3B
        kind = gguf.GGMLQuantizationType(format.ggml_id)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    matrix("token_embd", shape.vocab, shape.hidden)
    for i in range(shape.layers):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
        for name in ("attn_q", "attn_output"):
            matrix(f"blk.{i}.{name}", shape.hidden, shape.hidden)
        for name in ("attn_k", "attn_v"):
            matrix(f"blk.{i}.{name}", kv, shape.hidden)
        for name in ("ffn_gate", "ffn_up"):
            matrix(f"blk.{i}.{name}", shape.feed_forward, shape.hidden)
        matrix(f"blk.{i}.ffn_down", shape.hidden, shape.feed_forward)
    writer.add_tensor("output_norm.weight", ones)
    matrix("output", shape.vocab, shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: gguf.GGUFWriter, shape: Shape, context: int) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    pair = ALPHABET[:2]
    filler = [f"filler{i}" for i in range(shape.vocab - len(ALPHABET) - 2)]
    writer.add_token_list([*ALPHABET, "".join(pair), *filler, "<|end|>"])
    kinds = [gguf.TokenType.NORMAL] * (shape.vocab - 1)
    writer.add_token_types([*kinds, gguf.TokenType.CONTROL])
    writer.add_token_merges([" ".join(pair)])
    writer.add_eos_token_id(shape.vocab - 1)
    writer.add_add_bos_token(False)


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--format", choices=WRITABLE, default="q4_k")
    parser.add_argument("--context", type=int, default=32768)
    args = parser.parse_args()
    write(args.out, SHAPES[args.shape], args.format, context=args.context)


if __name__ == "__main__":
    main()
