"""Tiny models with random weights, as folders that transformers writes and as GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def write_folder(folder: Path, model: str = "LlamaForCausalLM", **config: Any) -> Path:
    """A model of this class of transformers, with a tokenizer of bytes."""
    import torch
    import transformers

    torch.manual_seed(7)
    kind = getattr(transformers, model)
    kind(kind.config_class(**SIZES | config)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(folder)


def write_gguf(path: Path, folder: Path) -> Path:
    """The model of a folder as a GGUF file."""
    from squall import convert
    from squall.checkpoints import open_checkpoint
    from squall.quant import Plan
    from squall.recipes import load

    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(folder)
    convert.write(checkpoint, load(checkpoint), Plan.of("q8_0"), path, threads=1)
    return path
