"""Write a GGUF file of a model's shape, all its matrices random and of one number format.

For speed and memory: arithmetic costs the same whatever the values are. Its text is noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from roofline import random_blocks
from squall.quant import FORMATS, GGML_FORMATS

if TYPE_CHECKING:  # a model in memory needs it not
    import gguf


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
    "8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "tiny": Shape(2, 256, 512, 8, 2, 1024),
}
# The gguf package has another size for blocks of q8_1.
WRITABLE = tuple(format.name for format in GGML_FORMATS.values() if format.name != "q8_1")
ALPHABET = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 324)]]


def matrices(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of each."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    yield "token_embd.weight", shape.vocab, shape.hidden
    for i in range(shape.layers):
        for name in ("attn_q", "attn_output"):
            yield f"blk.{i}.{name}.weight", shape.hidden, shape.hidden
        for name in ("attn_k", "attn_v"):
            yield f"blk.{i}.{name}.weight", kv, shape.hidden
        for name in ("ffn_gate", "ffn_up"):
            yield f"blk.{i}.{name}.weight", shape.feed_forward, shape.hidden
        yield f"blk.{i}.ffn_down.weight", shape.hidden, shape.feed_forward
    yield "output.weight", shape.vocab, shape.hidden


def norms(shape: Shape) -> Iterator[str]:
    """Their names; each has `hidden` values."""
    for i in range(shape.layers):
        yield from (f"blk.{i}.attn_norm.weight", f"blk.{i}.ffn_norm.weight")
    yield "output_norm.weight"


def fields(shape: Shape, context: int) -> dict[str, int | float]:
    """What the file says about the model, without `llama.` in front."""
    return {
        "block_count": shape.layers,
        "context_length": context,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.feed_forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": shape.hidden // shape.heads,
        "vocab_size": shape.vocab,
    }


def write(path: Path, shape: Shape, format_name: str, *, context: int = 32768) -> None:
    """One file; `format_name` is one of WRITABLE."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields(shape, context).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"llama.{key}", value)
    _tokenizer(writer, shape.vocab)
    format = FORMATS[format_name]
    rng = np.random.default_rng(0)
    for name in norms(shape):
        writer.add_tensor(name, np.ones(shape.hidden, np.float32))
    for name, rows, cols in matrices(shape):
        data = random_blocks(rng, rows * format.row_bytes(cols)).reshape(rows, -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(format.ggml_id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    pair = ALPHABET[:2]
    filler = [f"filler{i}" for i in range(vocab - len(ALPHABET) - 2)]
    writer.add_token_list([*ALPHABET, "".join(pair), *filler, "<|end|>"])
    kinds = [gguf.TokenType.NORMAL] * (vocab - 1)
    writer.add_token_types([*kinds, gguf.TokenType.CONTROL])
    writer.add_token_merges([" ".join(pair)])
    writer.add_eos_token_id(vocab - 1)
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
