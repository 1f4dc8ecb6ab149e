"""Model folders to quantize: float weights as safetensors, config.json and a tokenizer.

    python bench/folders.py random FOLDER [--shape tinyllama]    random weights of a model's shape
    python bench/folders.py dequantized FOLDER [MODEL.gguf]      the values of a llama GGUF file

Weights of the first are float16; those of the second float32, so that they are the file's. MODEL is
the default model unless given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from random_gguf import ALPHABET, SHAPES, Shape
from squall.checkpoints.writing import Item, Part, write_safetensors
from squall.locate import locate

Weights = Iterator[tuple[str, tuple[int, int], str]]
# Names of a GGUF file -> of a folder.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def write_random(folder: Path, shape: Shape) -> None:
    """A llama decoder whose weights are normal random numbers."""
    _configure(folder, shape, context=2048, epsilon=1e-5, theta=10000.0, tied=False)
    _tokenizer(folder, [*ALPHABET, *(f"filler{i}" for i in range(shape.vocab - len(ALPHABET)))], [])
    rng, kv = np.random.default_rng(0), shape.hidden // shape.heads * shape.kv_heads
    items: list[Item] = []

    def add(name: str, *sizes: int) -> None:
        def chunks() -> Iterator[NDArray[np.float16]]:
            values = rng.standard_normal(sizes, np.float32)
            yield (values * np.float32(0.02)).astype(np.float16) if len(sizes) > 1 else ones

        ones = np.ones(sizes, np.float16)
        items.append(Item(f"{name}.weight", "f16", sizes, Part(2 * int(np.prod(sizes)), chunks())))

    add("model.embed_tokens", shape.vocab, shape.hidden)
    for i in range(shape.layers):
        for name, rows in (("q", shape.hidden), ("k", kv), ("v", kv), ("o", shape.hidden)):
            add(f"model.layers.{i}.self_attn.{name}_proj", rows, shape.hidden)
        for name in ("gate", "up"):
            add(f"model.layers.{i}.mlp.{name}_proj", shape.feed_forward, shape.hidden)
        add(f"model.layers.{i}.mlp.down_proj", shape.hidden, shape.feed_forward)
        add(f"model.layers.{i}.input_layernorm", shape.hidden)
        add(f"model.layers.{i}.post_attention_layernorm", shape.hidden)
    add("model.norm", shape.hidden)
    add("lm_head", shape.vocab, shape.hidden)
    write_safetensors(folder / "model.safetensors", items, force=True)


def write_dequantized(folder: Path, source: Path) -> None:
    """The model of a llama GGUF file, its values as float32."""
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sizes = {key: fields[f"llama.{key}"] for key in _SIZES}
    shape = Shape(*sizes.values(), len(fields["tokenizer.ggml.tokens"]))  # type: ignore[misc]
    _configure(
        folder, shape, context=fields["llama.context_length"],
        epsilon=fields["llama.attention.layer_norm_rms_epsilon"],
        theta=fields["llama.rope.freq_base"], tied="output.weight" not in tensors,
    )  # fmt: skip
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    _tokenizer(folder, fields["tokenizer.ggml.tokens"], merges)
    items = []
    for tensor in tensors.values():
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for name, heads in (("attn_q", shape.heads), ("attn_k", shape.kv_heads)):
            if f".{name}." in tensor.name:
                values = _in_halves(values, heads)
        items.append(Item(_name(tensor.name), "f32", values.shape, Part(values.nbytes, [values])))
    write_safetensors(folder / "model.safetensors", items, force=True)


_SIZES = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv",
)  # fmt: skip


def _in_halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF pairs a head's rows (0, 1), (2, 3), ...; folders (0, n/2), (1, n/2 + 1), ..."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("blk."):
        return f"{OUTSIDE[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{BLOCK[part]}.{kind}"


def _configure(
    folder: Path, shape: Shape, *, context: int, epsilon: float, theta: float, tied: bool
) -> None:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab,
        "max_position_embeddings": context, "rms_norm_eps": epsilon, "rope_theta": theta,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def _tokenizer(folder: Path, tokens: list[str], merges: list[tuple[str, str]]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    random = commands.add_parser("random", help="random float16 weights")
    random.add_argument("folder", type=Path)
    random.add_argument("--shape", choices=SHAPES, default="tinyllama")
    dequantized = commands.add_parser("dequantized", help="the values of a GGUF file as float32")
    dequantized.add_argument("folder", type=Path)
    dequantized.add_argument("model", nargs="?")
    options = parser.parse_args()
    if options.command == "random":
        write_random(options.folder, SHAPES[options.shape])
    else:
        write_dequantized(options.folder, Path(locate(options.model)))


if __name__ == "__main__":
    main()
