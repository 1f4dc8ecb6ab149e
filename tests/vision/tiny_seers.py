"""Tiny models that see, as folders with all that a chat needs: tokenizer, template, sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parents[1] / "text/vision_templates"
TEXT: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 28, "patch_size": 7, "initializer_factor": 4.0,
}  # fmt: skip
QWEN_TOWER: dict[str, Any] = {
    "embed_dim": 32, "hidden_size": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2,
    "patch_size": 14,
}  # fmt: skip
CONTROLS = [
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|image|>",
]
FIRST = 258  # ids of bytes, and two before


@dataclass(frozen=True)
class Tiny:
    """A model to be made. images: of preprocessor_config.json."""

    model: str
    config: dict[str, Any]
    template: str
    images: dict[str, Any]


SEERS = {
    "llava": Tiny(
        "LlavaForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", **TOWER},
            "text_config": {"model_type": "llama", **TEXT},
            "image_token_index": FIRST,
        },
        "llava",
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    ),
    "qwen2vl": Tiny(
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": QWEN_TOWER,
            "text_config": {
                **TEXT,
                "rope_parameters": {
                    "rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4
                },
            },
            "image_token_id": FIRST + 4, "video_token_id": FIRST + 6,
            "vision_start_token_id": FIRST + 3, "vision_end_token_id": FIRST + 5,
        },
        "qwen2-vl",
        {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 64},
    ),
    "mllama": Tiny(
        "MllamaForConditionalGeneration",
        {
            "vision_config": {
                "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
                "num_global_layers": 1, "attention_heads": 3, "image_size": 28, "patch_size": 7,
                "intermediate_layers_indices": [0], "vision_output_dim": 48, "max_num_tiles": 4,
            },
            "text_config": TEXT | {
                "vocab_size": FIRST + 7, "num_hidden_layers": 3, "cross_attention_layers": [1],
            },
            "image_token_index": FIRST + 7,
        },
        "mllama",
        {"size": {"height": 28, "width": 28}, "max_image_tiles": 4},
    ),
}  # fmt: skip


def write_seer(folder: Path, name: str = "llava") -> Path:
    """The model of this name."""
    import torch
    import transformers

    made = SEERS[name]
    torch.manual_seed(11)
    kind = getattr(transformers, made.model)
    model = kind(kind.config_class(**made.config))
    for name, weight in model.named_parameters():
        if "gate" in name and weight.numel() == 1:  # which begin closed
            weight.data.fill_(0.7)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(made.images))
    template = (TEMPLATES / f"{made.template}.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in CONTROLS])
    PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
