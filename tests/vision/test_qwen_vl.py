"""Qwen2-VL and Qwen2.5-VL: pixels, rows, positions and answers as transformers has them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pictures import PICTURES, draw
from PIL import Image
from seeing import (
    CLOSE,
    MOVED,
    TEXT,
    Prompt,
    Seen,
    Seer,
    answers,
    build,
    check_answers,
    check_rows,
    distance,
    same_pixels,
    unmoved,
)

from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.recipes import load
from squall.spec import Rope
from squall.vision.placing import Run
from squall.vision.qwen import Qwen, rope_positions

IDS = {"image_token_id": 80, "vision_start_token_id": 81, "vision_end_token_id": 82}
ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 2, 2]}
INNER: dict[str, Any] = {k: v for k, v in TEXT.items() if k != "model_type"}
INNER |= {"rope_parameters": ROPE}
TOWER: dict[str, Any] = {
    "depth": 3, "embed_dim": 24, "hidden_size": 40, "num_heads": 3, "mlp_ratio": 2, "patch_size": 4,
    "rope_parameters": {"rope_theta": 50.0},
}  # fmt: skip
WINDOWED: dict[str, Any] = {
    "depth": 3, "hidden_size": 24, "out_hidden_size": 40, "num_heads": 3, "intermediate_size": 36,
    "patch_size": 4, "window_size": 19, "fullatt_block_indexes": [1],
    "rope_parameters": {"rope_theta": 50.0},
}  # fmt: skip
PROCESSOR: dict[str, Any] = {"patch_size": 4, "min_pixels": 300, "max_pixels": 3000}
OLD, NEW = "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
PIL = "Qwen2VLImageProcessorPil"


def config(tower: dict[str, Any], **text: Any) -> dict[str, Any]:
    return {"vision_config": tower, "text_config": INNER | text, "video_token_id": 83, **IDS}


def runs(prompt: Prompt) -> list[Run]:
    return [Run(i, start, stop, 0) for i, (start, stop, _) in enumerate(prompt.images)]


def positions(prompt: Prompt) -> Any:
    grids = [grid for _, _, grid in prompt.images if grid is not None]
    return rope_positions(len(prompt.tokens), runs(prompt), grids)


def kinds(ids: torch.Tensor) -> dict[str, Any]:
    return {"mm_token_type_ids": (ids == 80).int()}


def published(name: str) -> str:
    """As the first versions of transformers called tensors."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def case(name: str, model: str, tower: dict[str, Any], **more: Any) -> Seer:
    family = Qwen.of if model == OLD else partial(Qwen.of, window=112)
    return Seer(
        name, model, more.pop("config", config(tower)), family, PIL, PROCESSOR,
        {"<|image_pad|>": 80}, more=kinds, rotary=positions, **more,
    )  # fmt: skip


def wide(tower: dict[str, Any], size: int) -> dict[str, Any]:
    """Two heads of another size."""
    return tower | {
        "embed_dim" if "embed_dim" in tower else "hidden_size": 2 * size,
        "num_heads": 2,
    }


CASES = [
    case("2", OLD, TOWER),
    case("2 published", OLD, wide(TOWER, 80), rename=published),
    case("2.5", NEW, WINDOWED),
    case("2.5 published", NEW, wide(WINDOWED, 72), rename=published),
    case("2.5 without windows", NEW, WINDOWED | {"fullatt_block_indexes": [0, 1, 2]}),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(request.param, tmp_path_factory.mktemp("qwen"))


def test_rows(seen: Seen) -> None:
    check_rows(seen, list(PICTURES.values())[::5])


def test_answers(seen: Seen) -> None:
    first, second = draw("text", 40, 30), draw("gradient", 25, 90)
    check_answers(seen, [[1, 5, 6, 7]])
    check_answers(seen, [[1, first, 6, second, 9, first, 7, 8]], cut=5)
    check_answers(seen, [[1, 5, first, 6], [7, second, 8]])
