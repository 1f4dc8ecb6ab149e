"""A FLUX.1 of random weights, as diffusers makes it and saves it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

LATENT = 4
T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 77,
}  # fmt: skip
FLUX = {
    "in_channels": 4 * LATENT, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
VAE = {
    "block_out_channels": (32, 32, 64, 64), "latent_channels": LATENT, "layers_per_block": 1,
    "norm_num_groups": 32, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def pipeline(folder: Path, *, guidance: bool = False, **changes: Any) -> FluxPipeline:
    """One that is saved in the folder, and read again."""
    torch.manual_seed(5)
    clip_tokens, t5_tokens = tokenizers(folder)
    clip = CLIP | {
        "vocab_size": len(clip_tokens), "eos_token_id": clip_tokens.eos_token_id,
        "bos_token_id": clip_tokens.bos_token_id, "pad_token_id": clip_tokens.pad_token_id,
    }  # fmt: skip
    made = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance),
        vae=scattered(AutoencoderKL(**VAE)),
        text_encoder=scattered(CLIPTextModel(CLIPTextConfig(**clip))),
        tokenizer=clip_tokens,
        text_encoder_2=scattered(T5EncoderModel(T5Config(vocab_size=len(t5_tokens), **T5))),
        tokenizer_2=t5_tokens,
        transformer=scattered(FluxTransformer2DModel(guidance_embeds=guidance, **FLUX | changes)),
    )
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def scattered(model: Any) -> Any:
    """Every weight large enough to matter."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5) if "norm" in name and "bias" not in name else (
                    weight.normal_(0.0, 0.2)
                )
            else:
                weight.normal_(0.0, weight[0].numel() ** -0.5)
    return model.eval()


def tokenizers(folder: Path) -> tuple[Any, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"{one}</w>" for one in alphabet), "ca", "cat</w>"]
    names += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = folder / "clip-vocab.json", folder / "clip-merges.txt"
    vocab.write_text(json.dumps({name: i for i, name in enumerate(names)}))
    merges.write_text("#version: 0.2\nc a\nca t</w>\n")
    clip = CLIPTokenizer(str(vocab), str(merges), model_max_length=77)
    vocab.unlink(), merges.unlink()
    pieces = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    pieces += [(one, -3.0) for one in ("▁", *string.printable[:94])] + [("▁cat", -4.0)]
    t5 = Tokenizer(models.Unigram(pieces, unk_id=2))
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return clip, PreTrainedTokenizerFast(tokenizer_object=t5, model_max_length=512, **names)
