"""Tiny models that see, as folders with everything that a chat needs."""

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
SIGLIP: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
PERCEIVER: dict[str, Any] = {
    "hidden_size": 48, "resampler_n_latents": 5, "resampler_depth": 1, "resampler_n_heads": 4,
    "resampler_head_dim": 6, "num_key_value_heads": 2,
}  # fmt: skip
MLLAMA_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
    "attention_heads": 4, "image_size": 42, "patch_size": 14, "vision_output_dim": 64,
    "intermediate_layers_indices": [0], "max_num_tiles": 4,
}  # fmt: skip
CONTROLS = """
<image> <|im_start|> <|im_end|> <|vision_start|> <|image_pad|> <|vision_end|> <|video_pad|>
<|image|> <fake_token_around_image> <end_of_utterance> <|user|> <|assistant|> <|end|>
<start_of_image> <end_of_image> <image_soft_token> <start_of_turn> <end_of_turn>
<global-img> <row_1_col_1> <row_1_col_2> <row_1_col_3> <row_2_col_1> <row_2_col_2> <row_2_col_3>
<row_3_col_1> <row_3_col_2>
"""
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
    "llava_next": Tiny(
        "LlavaNextForConditionalGeneration",
        {
            "vision_config": {"model_type": "clip_vision_model", **TOWER},
            "text_config": {"model_type": "mistral", **TEXT},
            "image_token_index": FIRST, "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
        "llava",
        {
            "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
    ),
    "idefics2": Tiny(
        "Idefics2ForConditionalGeneration",
        {
            "vision_config": SIGLIP, "perceiver_config": PERCEIVER, "image_token_id": FIRST,
            "text_config": {"model_type": "mistral", **TEXT},
        },
        "idefics2",
        {"size": {"shortest_edge": 14, "longest_edge": 28}, "do_image_splitting": True},
    ),
    "smolvlm": Tiny(
        "SmolVLMForConditionalGeneration",
        {
            "vision_config": SIGLIP, "image_token_id": FIRST, "scale_factor": 2,
            "text_config": {"model_type": "llama", **TEXT},
        },
        "idefics2",
        {"size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 28}},
    ),
    "gemma3": Tiny(
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": SIGLIP | {"model_type": "siglip_vision_model"},
            "text_config": {
                **TEXT, "model_type": "gemma3_text", "head_dim": 12, "query_pre_attn_scalar": 12,
                "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"],
            },
            "mm_tokens_per_image": 16, "boi_token_index": FIRST + 13,
            "eoi_token_index": FIRST + 14, "image_token_index": FIRST + 15,
            "tie_word_embeddings": False,
        },
        "gemma3",
        {
            "size": {"height": 28, "width": 28}, "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 24, "pan_and_scan_max_num_crops": 3,
            "pan_and_scan_min_ratio_to_activate": 1.3,
        },
    ),
    "vllama": Tiny(
        "MllamaForConditionalGeneration",
        {
            "vision_config": MLLAMA_TOWER, "image_token_index": FIRST + 7,
            "text_config": {
                **TEXT, "cross_attention_layers": [1], "num_hidden_layers": 3,
                "vocab_size": FIRST + 7,
            },
        },
        "mllama",
        {"size": {"height": 42, "width": 42}, "max_image_tiles": 4},
    ),
    "phi3v": Tiny("Phi3ForCausalLM", TEXT, "phi-3-vision", {"num_crops": 4}),
}  # fmt: skip
# What Phi 3 Vision has beside Phi 3.
PHI3V: dict[str, Any] = {
    "architectures": ["Phi3VForCausalLM"],
    "model_type": "phi3_v",
    "img_processor": {"name": "clip_vision_model", "num_img_tokens": 144},
    "embd_layer": {"embedding_cls": "image", "use_hd_transform": True},
}


def write_seer(folder: Path, name: str = "llava") -> Path:
    """The model of this name."""
    import torch
    import transformers

    made = SEERS[name]
    torch.manual_seed(11)
    kind = getattr(transformers, made.model)
    model = kind(kind.config_class(**made.config))
    for weight_name, weight in model.named_parameters():
        if "gate" in weight_name and weight.numel() == 1:  # which begin closed
            weight.data.fill_(0.7)
<<<<<<< HEAD
        if "input_projection" in weight_name:  # of zeros, so that nothing would be seen
=======
        elif "mm_input_projection" in weight_name:  # which begins as zeros
>>>>>>> rva
            weight.data.normal_()
    model.save_pretrained(folder)
    if name == "phi3v":
        _add_eyes(folder)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(made.images))
    template = (TEMPLATES / f"{made.template}.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def _add_eyes(folder: Path) -> None:
    """CLIP, newlines and a projector, with the makers' names."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = TOWER | {"hidden_size": 64, "image_size": 336, "patch_size": 14}
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes | {"num_attention_heads": 1}))
    before = "model.vision_embed_tokens."
    wide, hidden = 4 * sizes["hidden_size"], TEXT["hidden_size"]
    made = {
        "glb_GN": torch.randn(1, 1, wide), "sub_GN": torch.randn(1, 1, 1, wide),
        "img_projection.0.weight": torch.randn(hidden, wide) / 16,
        "img_projection.0.bias": torch.randn(hidden),
        "img_projection.2.weight": torch.randn(hidden, hidden),
        "img_projection.2.bias": torch.randn(hidden),
    }  # fmt: skip
    for name, tensor in clip.state_dict().items():
        made[f"img_processor.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    text = load_file(folder / "model.safetensors")
    save_file(text | {before + name: t for name, t in made.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | PHI3V))


def write_tokenizer(folder: Path) -> None:
    """Of bytes, and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True) for name in CONTROLS.split()])
    PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
