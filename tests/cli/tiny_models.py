"""Tiny models with random weights, as folders that transformers writes and as GGUF files."""

from __future__ import annotations

import json
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


def write_bert(folder: Path) -> Path:
    """A model that embeds."""
    from transformers import BertConfig, BertModel

    sizes = {name: value for name, value in SIZES.items() if "token" not in name}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
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


def write_adapter(folder: Path, base: Path, seed: int = 1, rank: int = 4, **config: Any) -> Path:
    """A LoRA adapter for the model of a folder, as PEFT writes it, that changes answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    given: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "up_proj"]} | config
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=rank, lora_alpha=2 * rank, **given)
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def write_xlora(folder: Path, base: Path, names: list[str], base_id: str, **config: Any) -> Path:
    """An X-LoRA model in mistral.rs's files: adapters in folders, a classifier of one linear."""
    import torch
    from safetensors.torch import save_file

    for number, name in enumerate(names):
        write_adapter(folder / name, base, number)
    size = json.loads((base / "config.json").read_text())["hidden_size"]
    known = {"hidden_size": size, "base_model_id": base_id, "adapters": names} | config
    (folder / "xlora_config.json").write_text(json.dumps(known))
    torch.manual_seed(3)
    weights = {"last.weight": torch.randn(len(names), size), "last.bias": torch.randn(len(names))}
    save_file(weights, folder / "xlora_classifier.safetensors")
    return folder


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
