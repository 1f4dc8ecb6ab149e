"""Llama 3.2 Vision in transformers: logits of a prompt with images, and of an answer to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)


def mask(ids: Sequence[int], image: int, tiles: Sequence[int]) -> NDArray[np.int64]:
    """Which tiles tokens see, [ids, images, 4]."""
    locations = [get_cross_attention_token_mask(list(ids), image)]
    found: NDArray[np.int64] = convert_sparse_cross_attention_mask_to_dense(
        locations, [list(tiles)], 4, len(ids)
    )[0]
    return found


def logits(
    model: Any,
    prompt: Sequence[int],
    answer: Sequence[int],
    images: Sequence[Image.Image],
    processor: Mapping[str, Any],
) -> NDArray[np.float32]:
    """Tokens of the answer see what the last of the prompt does, as `generate` has it."""
    inputs: dict[str, Any] = {}
    config = getattr(model, "base_model", model).config
    if images:
        make = transformers.MllamaImageProcessorPil(**processor)
        inputs = dict(make(images=[list(images)], return_tensors="pt"))
        seen = mask(prompt, config.image_token_index, inputs.pop("num_tiles")[0])
        seen = np.concatenate([seen, np.repeat(seen[-1:], len(answer), axis=0)])
        inputs["cross_attention_mask"] = torch.tensor(seen[None])
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[*prompt, *answer]]), **inputs)
    found: NDArray[np.float32] = out.logits[0].numpy()
    return found
