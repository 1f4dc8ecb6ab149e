"""LoRA on towers and connectors, beside the weights and merged, against PEFT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "vision"))
from pictures import PICTURES
from tiny_seers import write_seer

from squall import Model
from squall.engine.request import CacheScope
from squall.vision.sight import Seen

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGE = PICTURES["gradient-RGB-640x480"]
# What the adapter changes: of the tower, the connector, and the language model.
MODULES = {
    "llava": r".*(vision_tower.*(q_proj|fc1|out_proj)|linear_2|language_model.*(v_proj|up_proj))",
    "qwen2vl": r".*(visual.*(qkv|fc2|attn\.proj|mlp\.0)|language_model.*(v_proj|down_proj))",
}


@pytest.fixture(scope="module", params=MODULES)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model's folder, the folder of an adapter, and PEFT's model with it."""
    import peft
    import torch
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    write_seer(folder / "base", request.param)
    base = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "base", dtype=torch.float32
    ).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES[request.param])
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data = torch.randn_like(weight) * 0.2
    model.save_pretrained(folder / "adapter")
    return folder, model.eval()


def wanted(peft_model: Any, image: Seen) -> Any:
    """Rows of the image as PEFT's model makes them."""
    import torch

    with torch.no_grad():
        return _features(peft_model.base_model.model, image)


def _features(model: Any, image: Seen) -> Any:
    import torch

    inputs = {name: torch.tensor(np.asarray(v)) for name, v in image.processed.inputs.items()}
    patches = inputs["patches"]
    if hasattr(model.config, "vision_feature_layer"):
        side = model.config.vision_config.patch_size
        count = model.config.vision_config.image_size // side
        tile = patches[1:].reshape(count, count, 3, side, side).permute(2, 0, 3, 1, 4)
        pixels = tile.reshape(1, 3, count * side, count * side)
        found = model.get_image_features(pixels, vision_feature_layer=-2)
    else:
        merge = model.config.vision_config.spatial_merge_size
        grid = image.processed.grid
        assert grid is not None
        size = torch.tensor([[1, grid[0] * merge, grid[1] * merge]])
        found = model.get_image_features(patches, size)
    rows = found.pooler_output
    return (rows[0] if isinstance(rows, list | tuple) else rows).reshape(-1, 48).numpy()


def distance(found: Any, right: Any) -> float:
    return float(np.abs(found - right).max() / np.sqrt((right**2).mean()))


def test_rows_of_towers(seen: Any) -> None:
    folder, peft_model = seen
    adapters = {"a": folder / "adapter"}
    with Model.open(folder / "base", adapters=adapters, weights="f32", context=512) as model:
        assert model.sight is not None
        image = model.sight.process(IMAGE)
        mixture, digest = model.adapters.choose("a")
        rows = model.sight.rows(image, mixture, CacheScope(adapter=digest))
        right = wanted(peft_model, image)
        assert distance(rows, right) < 1e-4
        assert distance(model.sight.rows(image), right) > 1e-2  # without
    with Model.open(
        folder / "base", adapters=adapters, merge=True, weights="f32", context=512
    ) as model:
        assert model.sight is not None
        assert distance(model.sight.rows(image), right) < 1e-4


def test_answers(seen: Any) -> None:
    """The same beside the weights and merged; another without."""
    folder, _ = seen
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is it?"}],
        }
    ]
    adapters = {"a": folder / "adapter"}
    given: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    with Model.open(folder / "base", adapters=adapters, weights="f32", context=512) as model:
        without = model.generate(chat, **given)
        beside = model.generate(chat, **given, adapters="a")
        assert beside.read() != without.read()
        assert model.sight is not None
        assert model.sight.encoded == 2
        assert model.generate(chat, **given, adapters="a").read() == beside.text
        assert model.sight.encoded == 2
    options: dict[str, Any] = {"merge": True, "weights": "f32", "context": 512}
    with Model.open(folder / "base", adapters=adapters, **options) as model:
        merged = model.generate(chat, **given)
        assert merged.read() == beside.text
