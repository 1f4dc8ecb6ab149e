"""LLaVA: pixels, rows and answers as transformers has them."""

from __future__ import annotations

from typing import Any

import pytest
from pictures import PICTURES, draw
from seeing import TEXT, Seen, Seer, build, check_answers, check_rows, same_pixels, unfold, unmoved

from squall.vision.llava import Llava

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 36,
    "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 21, "patch_size": 7,
    "layer_norm_eps": 0.01,
}  # fmt: skip
PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 21}, "crop_size": {"height": 21, "width": 21},
}  # fmt: skip
MODEL, PIL = "LlavaForConditionalGeneration", "LlavaImageProcessorPil"


def config(vision: dict[str, Any] = CLIP, text: dict[str, Any] = TEXT, **more: Any) -> Any:
    return {"vision_config": vision, "text_config": text, "image_token_index": 80, **more}


CASES = [
    Seer("llava", MODEL, config(), Llava.of, PIL, PROCESSOR),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(request.param, tmp_path_factory.mktemp("llava"))


def test_rows(seen: Seen) -> None:
    check_rows(seen, list(PICTURES.values())[::5])


def test_answers(seen: Seen) -> None:
    first, second = draw("text", 40, 30), draw("gradient", 25, 60)
    check_answers(seen, [[1, 5, 6, 7]])
    check_answers(seen, [[1, first, 6, second, first, 7, 8]], cut=5)
    check_answers(seen, [[1, 5, first, 6], [7, second, 8]])


def test_every_field_matters(seen: Seen) -> None:
    assert not unmoved(seen, draw("noise", 40, 30))


def test_processor(seen: Seen) -> None:
    same_pixels(
        seen.family.process,
        lambda image: unfold(seen.case.pixels([image])["pixel_values"].numpy(), 7),
    )
