"""Idefics 2, Idefics 3 and SmolVLM: pixels, rows and answers as transformers has them."""

from __future__ import annotations

from typing import Any

import pytest
from pictures import PICTURES, draw
from seeing import TEXT, Seen, Seer, build, check_answers, check_rows, unmoved

from squall.vision.idefics import FAKE, Idefics2, Idefics3

VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 28, "patch_size": 7, "layer_norm_eps": 0.01,
}  # fmt: skip
PERCEIVER: dict[str, Any] = {
    "hidden_size": 40, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4,
    "resampler_head_dim": 6, "num_key_value_heads": 2, "rms_norm_eps": 0.01,
}  # fmt: skip
SIZES2: dict[str, Any] = {"size": {"shortest_edge": 17, "longest_edge": 37}}
SIZES3: dict[str, Any] = {
    "size": {"longest_edge": 60}, "max_image_size": {"longest_edge": 30},
}  # fmt: skip
IDS = {"<image>": 80, FAKE: 81, "<global-img>": 82, "\n": 83, "\n\n": 84} | {
    f"<row_{y}_col_{x}>": 60 + 4 * y + x for y in range(1, 4) for x in range(1, 4)
}


def idefics2(name: str, perceiver: dict[str, Any] = PERCEIVER, **processor: Any) -> Seer:
    config = {
        "vision_config": VISION, "perceiver_config": perceiver, "image_token_id": 80,
        "text_config": TEXT | {"model_type": "mistral", "sliding_window": 11},
    }  # fmt: skip
    return Seer(
        name, "Idefics2ForConditionalGeneration", config, Idefics2.of, "Idefics2ImageProcessorPil",
        SIZES2 | processor, IDS,
    )  # fmt: skip


def idefics3(name: str, model: str = "Idefics3", side: int = 28, **processor: Any) -> Seer:
    config = {
        "vision_config": VISION | {"image_size": side}, "text_config": TEXT, "scale_factor": 2,
        "image_token_id": 80,
    }  # fmt: skip
    kind = "idefics3" if model == "Idefics3" else "smolvlm"

    def family(config: Any, processor: Any) -> Idefics3:
        return Idefics3.of(config, processor, kind)

    return Seer(
        name, f"{model}ForConditionalGeneration", config, family, f"{model}ImageProcessorPil",
        SIZES3 | processor, IDS,
    )  # fmt: skip


CASES = [
    idefics2("idefics2", do_image_splitting=False),
    idefics2("idefics2-split", do_image_splitting=True),
    idefics2("idefics2-narrow", {**PERCEIVER, "hidden_size": 4096}, do_image_splitting=False),
    idefics3("idefics3"),
    idefics3("idefics3-whole", do_image_splitting=False, size={"longest_edge": 50}),
    idefics3("smolvlm", "SmolVLM", side=42),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(request.param, tmp_path_factory.mktemp("idefics"))


def test_rows(seen: Seen) -> None:
    pictures = [image for image in PICTURES.values() if min(image.size) > 1]
    check_rows(seen, pictures[::4])


def test_answers(seen: Seen) -> None:
    first, second = draw("text", 40, 30), draw("gradient", 30, 40)
    check_answers(seen, [[1, 5, 6, 7]])
    check_answers(seen, [[1, first, 6, first, second, 7, 8]], cut=7)
    check_answers(seen, [[1, 5, first, 6], [7, second, 8]])


def test_every_field_matters(seen: Seen) -> None:
    assert not unmoved(seen, draw("noise", 40, 30))
