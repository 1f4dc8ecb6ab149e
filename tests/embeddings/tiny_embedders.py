"""Tiny models that embed or judge, as folders with tokenizers, and transformers' rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

Floats = NDArray[np.float32]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *".,!?北京é", "the", "##ing"]
VOCAB = len(WORDS)
BERT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 130, "type_vocab_size": 2,
    "layer_norm_eps": 0.01,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256,
}  # fmt: skip
# Class of transformers -> its configuration's class, and values.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("BertConfig", BERT),
    "XLMRobertaModel": ("XLMRobertaConfig", BERT | {"type_vocab_size": 1, "pad_token_id": 1}),
    "RobertaModel": ("RobertaConfig", BERT | {
        "type_vocab_size": 1, "pad_token_id": 4, "max_position_embeddings": 133,
    }),
    "MPNetModel": (
        "MPNetConfig",
        {key: value for key, value in BERT.items() if key != "type_vocab_size"}
        | {"relative_attention_num_buckets": 32, "pad_token_id": 1},
    ),
    "DistilBertModel": ("DistilBertConfig", {
        "vocab_size": VOCAB, "dim": 48, "hidden_dim": 80, "n_layers": 3, "n_heads": 4,
        "max_position_embeddings": 130,
    }),
    "ElectraModel": ("ElectraConfig", BERT | {"embedding_size": 48}),
    "NomicBertModel": ("NomicBertConfig", BERT),
    "ModernBertModel": ("ModernBertConfig", {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 130, "norm_eps": 0.01,
        "local_attention": 14, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
        "cls_token_id": 2, "sep_token_id": 3,
    }),
    "Qwen3Model": ("Qwen3Config", DECODER),
    "LlamaModel": ("LlamaConfig", DECODER),
    "Gemma3TextModel": (
        "Gemma3TextConfig",
        DECODER | {
            "use_bidirectional_attention": True, "sliding_window": 14, "pad_token_id": 0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 20, "rms_norm_eps": 0.01,
        },
    ),
}  # fmt: skip
POOLED = {
    "cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken", "max": "max_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens",
}  # fmt: skip
TEXTS = (
    "a", "", "the cat sat, thinking of 北京!", "b c d e f g " * 9, "One", "x" * 30, "Éa [SEP] b",
    *(f"{word} and so on, {'going ' * (number % 7)}" for number, word in enumerate(LETTERS)),
)  # fmt: skip


def random(kind: str, config: Any, seed: int = 3) -> Any:
    """Every weight large enough to matter."""
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                weight.uniform_(0.5, 1.5)
            elif weight.dim() < 2:
                weight.normal_(0.0, 0.3)
            elif "embed" in name or "bias" in name:
                weight.normal_(0.0, 1.0)
            else:
                weight.normal_(0.0, 1.3 * weight[0].numel() ** -0.5)
    return model


def write(folder: Path, kind: str, *, of: str | None = None, **changes: Any) -> Any:
    """A model as transformers saves it, with a tokenizer. of: whose configuration it has."""
    config, values = MODELS[of or kind]
    model = random(kind, getattr(transformers, config)(**values | changes))
    model.save_pretrained(folder)
    word_pieces().save(str(folder / "tokenizer.json"))
    return model


def word_pieces() -> Tokenizer:
    library = Tokenizer(
        models.WordPiece(dict(zip(WORDS, range(VOCAB), strict=True)), unk_token="[UNK]")
    )
    library.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens([*SPECIAL])
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return library


def pooled(
    folder: Path, pooling: str, *, prompts: dict[str, str] | None = None, **more: Any
) -> None:
    """The files of sentence-transformers: a transformer and a pooling."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [
        {
            "idx": number,
            "name": str(number),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {f"pooling_mode_{name}": key == pooling for key, name in POOLED.items()}
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts or {}} | more)
    )


def rows(model: Any, ids: list[int]) -> Floats:
    with torch.no_grad():
        found: Floats = model(torch.tensor([ids])).last_hidden_state[0].numpy()
    return found


def vector(states: Floats, pooling: str) -> Floats:
    weights = np.arange(1, len(states) + 1)
    found: dict[str, Any] = {
        "cls": states[0], "mean": states.mean(0), "last": states[-1], "max": states.max(0),
        "mean_sqrt_len_tokens": states.sum(0) / len(states) ** 0.5,
        "weightedmean": (weights @ states) / weights.sum(),
    }  # fmt: skip
    made: Floats = found[pooling]
    return made


def ids(length: int, seed: int = 0) -> list[int]:
    """Ids without padding, whose positions transformers would count otherwise."""
    found: list[int] = np.random.default_rng([length, seed]).integers(5, VOCAB, length).tolist()
    return found
