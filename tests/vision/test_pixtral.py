"""Pixtral and Mistral 3: pixels, rows and answers as transformers has them."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from pictures import PICTURES, draw
from PIL import Image
from seeing import (
    TEXT,
    Seen,
    Seer,
    build,
    check_answers,
    check_rows,
    given,
    same_pixels,
    unfold,
    unmoved,
)

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.recipes import load
from squall.vision.families import FAMILIES
from squall.vision.pixtral import Pixtral

INNER = TEXT | {"model_type": "mistral", "sliding_window": None}
TOWER: dict[str, Any] = {
    "model_type": "pixtral", "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3,
    "intermediate_size": 36, "patch_size": 4, "image_size": 64, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "axial", "rope_theta": 50.0},
}  # fmt: skip
SPECIALS = {"[IMG]": 80, "[IMG_BREAK]": 81, "[IMG_END]": 82}
MISTRAL, LLAVA = "Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration"
PIL = "PixtralImageProcessorPil"
# What is added to the rows of a tower.
ADDED = r"vision_tower.*(patch_conv|ln_pre|o_proj|down_proj)"


def processor(side: int) -> dict[str, Any]:
    return {"size": {"longest_edge": 40}, "patch_size": {"height": side, "width": side}}


def config(tower: dict[str, Any] = TOWER, **more: Any) -> dict[str, Any]:
    return {"vision_config": tower, "text_config": INNER, "image_token_index": 80, **more}


def wide(size: int) -> dict[str, Any]:
    return TOWER | {"hidden_size": 2 * size, "num_attention_heads": 2, "head_dim": size}


def by_modules(name: str) -> str:
    """As some files have them, after the modules of transformers 4.52."""
    name = name.replace("language_model.lm_head.", "lm_head.")
    name = name.replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head.") else f"model.{name}"


def case(name: str, model: str, more: dict[str, Any], **fields: Any) -> Seer:
    merge = more.get("spatial_merge_size", 2 if model == MISTRAL else 1)
    return Seer(
        name, model, config(**more), FAMILIES[model], PIL, processor(4 * merge), SPECIALS, **fields
    )  # fmt: skip


FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
CASES = [
    case("mistral3", MISTRAL, {"tie_word_embeddings": False}),
    case("mistral3 faint", MISTRAL, {"tie_word_embeddings": False}, faint=ADDED),
    case(
        "mistral3 by modules", MISTRAL,
        {"tower": wide(80), "spatial_merge_size": 3, "multimodal_projector_bias": True,
         "tie_word_embeddings": False},
        rename=by_modules,
    ),
    case("mistral3 tied", MISTRAL, {"projector_hidden_act": "relu"}),
    case("pixtral", LLAVA, FULL),
    case("pixtral faint", LLAVA, FULL | {"multimodal_projector_bias": False}, faint=ADDED),
    case("pixtral by modules", LLAVA, FULL | {"tower": wide(72)}, rename=by_modules),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(request.param, tmp_path_factory.mktemp("pixtral"))


def test_rows(seen: Seen) -> None:
    # Of an image that is one row transformers makes none.
    pictures = [p for p in PICTURES.values() if seen.family.process(p).rows > 1]
    assert len(pictures) > 30
    check_rows(seen, pictures[::4])


def test_answers(seen: Seen) -> None:
    first, second = draw("text", 40, 30), draw("gradient", 25, 90)
    check_answers(seen, [[1, 5, 6, 7]])
    check_answers(seen, [[1, first, 6, second, 9, first, 7, 8]], cut=5)
    check_answers(seen, [[1, 5, first, 6], [7, second, 8]])


def test_every_field_matters(seen: Seen) -> None:
    found = unmoved(seen, draw("noise", 40, 30))
    assert not [name for name in found if (".eps" in name) == (seen.case.faint == ADDED)]


@pytest.mark.parametrize(
    ("merge", "patch", "processor"),
    [
        (1, 16, {}),
        (2, 14, {"size": {"longest_edge": 1540}}),
        (2, 14, {"size": {"height": 100, "width": 300}, "resample": 1}),
        (3, 5, {"size": {"longest_edge": 77}, "image_std": [0.5, 0.4, 0.3]}),
    ],
)
def test_pixels(merge: int, patch: int, processor: dict[str, Any]) -> None:
    config = {"vision_config": {"patch_size": patch}, "spatial_merge_size": merge}
    family = Pixtral.of(config, processor)
    side = merge * patch
    pil = getattr(transformers, PIL)(**processor | {"patch_size": {"height": side, "width": side}})

    def wanted(image: Image.Image) -> Any:
        mine = family.process(image)
        by = max(image.height / family.most[0], image.width / family.most[1], 1)
        if min(image.size) < by:  # no pixel would be left of the shorter side
            with pytest.raises(ValueError, match=r"(height|width)=0"):
                pil(images=[image], return_tensors="np")
            return given(mine)
        found = pil(images=[image], return_tensors="np")
        lines, columns = (int(n) // side for n in found["image_sizes"][0])
        assert mine.text == lines_of(lines, columns)
        assert mine.rows == lines * columns
        # Square by square, as rows are merged.
        at = mine.inputs["rotary"]
        return unfold(found["pixel_values"], patch)[at[0] * columns * merge + at[1]]

    same_pixels(family.process, wanted)


def lines_of(lines: int, columns: int) -> str:
    """By the method of a class that cannot be imported without torchvision."""
    path = Path(transformers.__file__).parent / "models/pixtral/processing_pixtral.py"
    name, scope = "replace_image_token", dict[str, Any]()
    functions = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))
    method = next(node for node in functions if node.name == name)
    exec(compile(ast.Module([method], []), str(path), "exec"), scope)
    processor = SimpleNamespace(
        image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]",
        patch_size=1, spatial_merge_size=1,
    )  # fmt: skip
    return str(scope[name](processor, {"image_sizes": [(lines, columns)]}, 0))


def test_nothing_is_too_thin() -> None:
    family = Pixtral.of({"vision_config": {}}, {"size": {"longest_edge": 64}})
    found = family.process(draw("text", 4000, 30))
    assert found.text == "[IMG]" * 4 + "[IMG_END]"
    assert found.rows == 4


def test_a_longest_edge() -> None:
    found = Pixtral.of({"vision_config": {}}, {"max_edge": 64}).process(draw("text", 400, 200))
    assert found.rows == 4 * 2
    found = Pixtral.of({"vision_config": {}}, {"max_edge": 9999}).process(draw("text", 1040, 65))
    assert found.rows == 64 * 4


@pytest.fixture(scope="module")
def pixtral(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(next(c for c in CASES if c.name == "pixtral"), tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(
    "top",
    [
        {"architectures": ["LlavaNextForConditionalGeneration"]},
        {"vision_feature_layer": -2},
        {"vision_feature_layer": [-1, 1]},
        {"vision_feature_select_strategy": "default"},
        {"vision_config": TOWER | {"num_attention_heads": 5}},
        {"vision_config": TOWER | {"head_dim": 12}},
        {"vision_config": TOWER | {"num_attention_heads": 4, "head_dim": 6}},
        {"vision_config": TOWER | {"patch_size": 5}},
        {"vision_config": TOWER | {"num_channels": 1}},
        {"vision_config": TOWER | {"num_hidden_layers": 4}},
        {"vision_config": TOWER | {"hidden_act": "sine"}},
        {"vision_config": TOWER | {"rope_parameters": {"rope_type": "linear"}}},
        {"vision_config": "none"},
    ],
    ids=str,
)
def test_refused_configs(pixtral: Seen, top: dict[str, Any]) -> None:
    metadata = {**pixtral.checkpoint.metadata, **top}
    with pytest.raises((InvalidCheckpoint, UnsupportedModel)):
        load(replace(pixtral.checkpoint, metadata=metadata))


@pytest.mark.parametrize("name", ["mistral3", "pixtral"])
def test_the_keys_of_published_files(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = next(c for c in CASES if c.name == name)
    seen = build(case, tmp_path)
    tower = {k: v for k, v in TOWER.items() if k != "rope_parameters"}
    tower |= {"rope_theta": 50.0, "head_dim": 8, "attention_dropout": 0.0, "num_channels": 3}
    text = {**INNER, "rms_norm_eps": 0.01, "use_cache": True, "head_dim": 10}
    metadata = {
        "architectures": [case.model], "model_type": "mistral3" if name == "mistral3" else "llava",
        "image_token_index": 80, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "text_config": text, "vision_config": tower, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
    } | (
        {"multimodal_projector_bias": False, "spatial_merge_size": 2} if name == "mistral3"
        else {"vision_feature_select_strategy": "full", "image_seq_length": 1, "ignore_index": -100}
    )  # fmt: skip
    caplog.clear()
    found = load(replace(seen.checkpoint, metadata=metadata))
    assert found.parts == seen.recipe.parts
    assert {r.args for r in caplog.records} <= {("'ignore_index'",)}


@pytest.mark.parametrize(
    ("vision", "processor"),
    [
        ({}, {"size": {"longest_edge": -5}}),
        ({}, {"size": {"longest_edge": 1 << 20}}),
        ({}, {"size": {"height": 100, "width": 0}}),
        ({}, {"image_std": 3}),
        ({}, {"do_resize": False}),
        ({"patch_size": "large"}, {}),
    ],
    ids=str,
)
def test_refused_processors(vision: dict[str, Any], processor: dict[str, Any]) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"\w+ is .*; it must be"):
        Pixtral.of({"vision_config": vision}, processor)
