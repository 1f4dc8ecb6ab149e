"""What the files beside a model say of images, as the tools that write them do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from squall.checkpoints.base import Checkpoint
from squall.vision import families
from squall.vision.family import Family

CONFIGS: dict[str, dict[str, Any]] = {
    "LlavaForConditionalGeneration": {"vision_config": {"image_size": 336, "patch_size": 14}},
    "Idefics3ForConditionalGeneration": {
        "vision_config": {"image_size": 384, "patch_size": 14}, "scale_factor": 3,
    },
    "Qwen2VLForConditionalGeneration": {"vision_config": {}},
}  # fmt: skip
SAID: dict[str, dict[str, Any]] = {
    "LlavaForConditionalGeneration": {"size": {"shortest_edge": 336}, "crop_size": 336},
    "Idefics3ForConditionalGeneration": {
        "size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384},
    },
    "Qwen2VLForConditionalGeneration": {"size": {"shortest_edge": 3136, "longest_edge": 999999}},
}  # fmt: skip
KEYS = """
crop_size do_center_crop do_image_splitting do_normalize do_pad do_rescale do_resize image_mean
image_std max_pixels min_pixels resample rescale_factor size
""".split()  # noqa: SIM905


def read(folder: Path, architecture: str, **files: Any) -> Family:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    checkpoint = SimpleNamespace(metadata=CONFIGS[architecture], beside={}, path=folder)
    return families.family(architecture, cast(Checkpoint, checkpoint))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_null_is_as_if_the_key_were_not_there(architecture: str, tmp_path: Path) -> None:
    """Savers write null for all that a processor has no value for."""
    said = SAID[architecture]
    plain = read(tmp_path, architecture, preprocessor_config=said)
    nulls = dict.fromkeys(KEYS) | said
    assert read(tmp_path, architecture, preprocessor_config=nulls) == plain


@pytest.mark.parametrize("architecture", CONFIGS)
def test_an_image_processor_within_processor_config_is_the_one(
    architecture: str, tmp_path: Path
) -> None:
    said = SAID[architecture]
    plain = read(tmp_path, architecture, preprocessor_config=said)
    files = {"processor_config": {"image_processor": said}}
    old = said | {"image_mean": [0.1, 0.2, 0.3]}
    assert read(tmp_path, architecture, preprocessor_config=old, **files) == plain
    files = {"processor_config": {"image_processor": None, "patch_size": 14}}
    assert read(tmp_path, architecture, preprocessor_config=said, **files) == plain
