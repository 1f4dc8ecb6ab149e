"""Which family reads the images of which architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from squall.checkpoints.base import Checkpoint
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import read_json
from squall.recipes import mmproj
from squall.vision.family import Family
from squall.vision.gemma3 import Gemma3
from squall.vision.idefics import Idefics2, Idefics3
from squall.vision.llava import Llava, LlavaNext
from squall.vision.mllama import Mllama
from squall.vision.phi3v import Phi3V
from squall.vision.pixtral import Pixtral
from squall.vision.qwen import Qwen

LOW_EDGE = 512


def llava(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Family:
    """By its tower."""
    kind = config["vision_config"].get("model_type")
    return Pixtral.of(config, processor) if kind == "pixtral" else Llava.of(config, processor)


# By config.json and preprocessor_config.json.
FAMILIES: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Family]] = {
    "Gemma3ForConditionalGeneration": Gemma3.of,
    "Idefics2ForConditionalGeneration": Idefics2.of,
    "Idefics3ForConditionalGeneration": Idefics3.of,
    "LlavaForConditionalGeneration": llava,
    "LlavaNextForConditionalGeneration": LlavaNext.of,
    "Mistral3ForConditionalGeneration": partial(Pixtral.of, merge=2),
    "Phi3VForCausalLM": Phi3V.of,
    "MllamaForConditionalGeneration": Mllama.of,
    "Qwen2VLForConditionalGeneration": Qwen.of,
    "Qwen2_5_VLForConditionalGeneration": partial(Qwen.of, window=112),
    "SmolVLMForConditionalGeneration": Idefics3.of,
}


def _low(said: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {**said, "do_image_splitting": False, "num_crops": 1}
    if tiles := said.get("image_grid_pinpoints"):
        found["image_grid_pinpoints"] = [min(tiles, key=math.prod)]
    return found | {"max_edge": min(LOW_EDGE, said.get("max_edge", LOW_EDGE))}


def family(
    architecture: str, checkpoint: Checkpoint, max_edge: int | None = None, *, low: bool = False
) -> Family:
    """The family of a model, with what its folder says of images.

    max_edge: pictures are made smaller first, until their longer edge is at most so long.
    low: as few tiles as can be, and where pictures keep their size, an edge of at most LOW_EDGE.
    """
    config: Mapping[str, Any] = checkpoint.metadata
    if mmproj.SOURCE in checkpoint.beside:
        architecture, processor = mmproj.described(checkpoint.beside[mmproj.SOURCE])
        config = processor
    else:
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        whole = read_json(folder / "processor_config.json") or {}
        own = read_json(folder / "preprocessor_config.json") or {}
        inner = whole.get("image_processor")
        said = inner if isinstance(inner, dict) else own
        processor = {key: value for key, value in said.items() if value is not None}
    if architecture not in FAMILIES:
        raise UnsupportedModel(f"images of {architecture} are not known")
    processor |= {} if max_edge is None else {"max_edge": max_edge}
    try:
        if low:
            config, processor = _low(config), _low(processor)
        return FAMILIES[architecture](config, processor)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidCheckpoint(
            f"preprocessor_config.json does not say how images are read: {error!r:.200}"
        ) from None
