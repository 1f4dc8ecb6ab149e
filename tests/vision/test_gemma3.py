"""Gemma 3: pixels, rows and answers as transformers has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pictures import PICTURES, draw
from PIL import Image
from seeing import (
    Seen,
    Seer,
    build,
    check_answers,
    check_rows,
    expansion,
    same_pixels,
    unfold,
    unmoved,
)

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes import load
from squall.vision.gemma3 import Gemma3

VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 36,
    "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 28, "patch_size": 7,
    "layer_norm_eps": 0.01, "vision_use_head": False,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": 90, "hidden_size": 40, "intermediate_size": 56,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "query_pre_attn_scalar": 12, "max_position_embeddings": 1024, "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rms_norm_eps": 0.01, "pad_token_id": 0,
}  # fmt: skip
PROCESSOR: dict[str, Any] = {"size": {"height": 28, "width": 28}}
SCAN = {
    "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.3,
}  # fmt: skip
IDS = {"<start_of_image>": 80, "<end_of_image>": 81, "<image_soft_token>": 82, "\n\n": 83}
TOKENS = {"boi_token_index": 80, "eoi_token_index": 81, "image_token_index": 82}


def kinds(ids: torch.Tensor) -> dict[str, Any]:
    """Which tokens are those of images."""
    return {"token_type_ids": (ids == 82).int()}


def case(name: str, tokens: int, **processor: Any) -> Seer:
    config = {
        "vision_config": VISION, "text_config": TEXT, "mm_tokens_per_image": tokens, **TOKENS,
    }  # fmt: skip
    return Seer(
        name, "Gemma3ForConditionalGeneration", config, Gemma3.of, "Gemma3ImageProcessorPil",
        PROCESSOR | processor, IDS, more=kinds,
    )  # fmt: skip


def newer(name: str) -> str:
    """As some versions of transformers save it; others as it was published."""
    return "model." + name.replace("language_model.model.", "language_model.")


CASES = [
    case("gemma3", 4), case("gemma3-scan", 4, **SCAN), case("gemma3-single", 1),
    replace(case("gemma3-newer", 4), rename=newer),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(request.param, tmp_path_factory.mktemp("gemma3"))


def test_rows(seen: Seen) -> None:
    check_rows(seen, list(PICTURES.values())[::5])


def test_answers(seen: Seen) -> None:
    first, second = draw("text", 40, 30), draw("gradient", 25, 60)
    check_answers(seen, [[1, 5, 6, 7]])
    check_answers(seen, [[1, first, 6, second, first, 7, 8]])
    check_answers(seen, [[1, 5, first, 6], [7, second, 8]])


def test_every_field_matters(seen: Seen) -> None:
    assert not unmoved(seen, draw("noise", 40, 30))


def pil(image: Image.Image, processor: dict[str, Any]) -> Any:
    return transformers.Gemma3ImageProcessorPil(**processor)([image])


# As published, and as published with an option.
PUBLISHED: dict[str, Any] = {
    "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True,
    "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 256, "image_std": [0.5, 0.5, 0.5], "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None, "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor", "resample": 2, "rescale_factor": 1 / 255,
    "size": {"height": 896, "width": 896},
}  # fmt: skip
WANTED = {
    "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}  # fmt: skip


@pytest.mark.parametrize("scan", [{}, SCAN, {**SCAN, "pan_and_scan_max_num_crops": 1}])
def test_processor(scan: dict[str, Any]) -> None:
    processor = {**PROCESSOR, **scan}
    family = Gemma3.of({"vision_config": VISION, "mm_tokens_per_image": 4}, processor)
    same_pixels(
        family.process, lambda image: unfold(np.array(pil(image, processor)["pixel_values"]), 7)
    )
    for image in PICTURES.values():
        crops, each = pil(image, processor)["num_crops"], "\n\n<start_of_image>"
        each += "<image_soft_token>" * 4 + "<end_of_image>\n\n"
        made = expansion("Gemma3Processor", {"num_crops": crops}, full_image_sequence=each)
        assert family.process(image).text == made


@pytest.mark.parametrize("more", [{}, {"do_pan_and_scan": True}])
def test_published_processor(more: dict[str, Any]) -> None:
    vision = {"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14}
    family = Gemma3.of({"vision_config": vision}, PUBLISHED | more)
    image = draw("text", 1000, 300)
    wanted = pil(image, PUBLISHED | (WANTED if more else {"do_pan_and_scan": False}))
    processed = family.process(image)
    assert processed.rows == 256 * len(wanted["pixel_values"]) == 256 * (4 if more else 1)
    patches = unfold(np.array(wanted["pixel_values"]), 14)
    assert np.abs(processed.inputs["patches"] - patches).max() < 1e-5
    assert processed.inputs["merged"].shape == (16, processed.rows)


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        ({"size": {"height": 28, "width": 27}}, "size is .28, 27"),
        ({"size": {"height": 10**9, "width": 28}}, "height is 1000000000"),
        ({"size": {"height": -28, "width": 28}}, "height is -28"),
        ({"size": {"shortest_edge": 28}}, "size is 28"),
        ({"do_resize": False}, "do_resize"),
        ({"pan_and_scan_min_crop_size": 0}, "min_crop_size"),
        ({"pan_and_scan_max_num_crops": 10**6}, "max_num_crops"),
        ({"pan_and_scan_min_crop_size": 3, "pan_and_scan_max_num_crops": 5}, "is below"),
    ],
)
def test_processors_that_cannot_be(processor: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=says):
        Gemma3.of({"vision_config": VISION}, PROCESSOR | processor)


def test_sizes_that_cannot_be(seen: Seen) -> None:
    def altered(**changed: Any) -> Any:
        metadata = {**seen.checkpoint.metadata, **changed}
        return load(replace(seen.checkpoint, metadata=metadata))

    with pytest.raises(InvalidCheckpoint, match="5; 4 x 4 patches do not make as many"):
        altered(mm_tokens_per_image=5)
    with pytest.raises(InvalidCheckpoint, match="mm_tokens_per_image is 9"):
        altered(mm_tokens_per_image=9)
    with pytest.raises(UnsupportedModel, match="sliding_window"):
        altered(mm_tokens_per_image=16)


def test_the_language_model_alone(seen: Seen) -> None:
    tensors = {n: t for n, t in seen.checkpoint.tensors.items() if "language_model" in n}
    recipe = load(replace(seen.checkpoint, tensors=tensors))
    assert [part.kind for part in recipe.parts] == ["decoder"]
    assert not recipe.sees
    assert replace(recipe.decoder, sees=True) == seen.recipe.decoder
