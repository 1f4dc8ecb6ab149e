"""Qwen2-VL and Qwen2.5-VL: pixels, rows, positions and answers as transformers has them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pictures import PICTURES, draw
from PIL import Image
from seeing import (
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
from squall.vision.families import FAMILIES
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
WINDOWS = 112
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


def by_modules(name: str) -> str:
    """As some files have them, after the modules of transformers 4.52."""
    name = name.replace("visual.", "model.visual.")
    return re.sub(r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1", name)


def case(name: str, model: str, tower: dict[str, Any], **more: Any) -> Seer:
    return Seer(
        name, model, more.pop("config", config(tower)), FAMILIES[model], PIL, PROCESSOR,
        {"<|image_pad|>": 80}, more=kinds, rotary=positions, **more,
    )  # fmt: skip


def wide(tower: dict[str, Any], size: int) -> dict[str, Any]:
    """Two heads of another size."""
    key = "embed_dim" if "embed_dim" in tower else "hidden_size"
    return tower | {key: 2 * size, "num_heads": 2}


# What is added to the rows of a tower.
ADDED = r"visual.*(patch_embed|attn\.proj|fc2|down_proj)"
CASES = [
    case("2", OLD, TOWER, faint=ADDED),
    case("2 by modules", OLD, wide(TOWER, 80), rename=by_modules),
    case("2.5", NEW, WINDOWED, faint=ADDED),
    case("2.5 by modules", NEW, wide(WINDOWED, 72), rename=by_modules),
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


def test_every_field_matters(seen: Seen) -> None:
    found = unmoved(seen, draw("noise", 40, 30))
    assert not [name for name in found if seen.case.faint == ADDED or ".eps" not in name]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(CASES[0], tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("axes", [(), (0, 2, 2, 1, 1), (0, 0, 1, 2, 2), (1, 1, 1, 2, 2)])
def test_text_turns_with_its_own_axes(small: Seen, axes: tuple[int, ...]) -> None:
    turn = [1, 5, draw("text", 40, 30), 6]
    _, right, _ = answers(small, [turn], drawn=1)
    recipe, spec = small.recipe, small.recipe.decoder

    def turned(rope: Rope | None) -> Rope:
        assert rope is not None
        return replace(rope, axes=axes)

    layers = tuple(
        replace(y, attention=replace(y.attention, rope=turned(y.attention.rope)))
        for y in spec.layers
    )
    changed = replace(recipe.part("decoder"), spec=replace(spec, layers=layers))
    rest = [part for part in recipe.parts if part.kind != "decoder"]
    other = replace(small, recipe=replace(recipe, parts=(changed, *rest)))
    if not axes:
        other = replace(other, case=replace(other.case, rotary=None))
    _, found, _ = answers(other, [turn], drawn=1)
    assert distance(found, right) > MOVED


@pytest.mark.parametrize(
    "processor",
    [
        {},
        PROCESSOR,
        {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 300}},
        {"size": {"shortest_edge": 10, "longest_edge": 28 * 28}, "resample": 2},
        {"min_pixels": 28 * 28 * 9, "max_pixels": 28 * 28 * 10, "image_mean": [0.5, 0.4, 0.3]},
        {"patch_size": 16, "merge_size": 3, "temporal_patch_size": 1, "rescale_factor": 0.01},
    ],
    ids=str,
)
def test_pixels(processor: dict[str, Any]) -> None:
    vision = {
        "patch_size": processor.get("patch_size", 14),
        "spatial_merge_size": processor.get("merge_size", 2),
        "temporal_patch_size": processor.get("temporal_patch_size", 2),
    }
    family = Qwen.of({"vision_config": vision}, processor)
    pil = getattr(transformers, PIL)(**processor)

    def wanted(image: Image.Image) -> Any:
        found, mine = pil(images=[image], return_tensors="np"), family.process(image)
        merge = vision["spatial_merge_size"]
        assert found["image_grid_thw"][0].tolist() == [1, *(n * merge for n in mine.grid or ())]
        assert mine.rows == math.prod(mine.grid or ()) == len(found["pixel_values"]) // merge**2
        assert mine.text == f"<|vision_start|>{'<|image_pad|>' * mine.rows}<|vision_end|>"
        return found["pixel_values"]

    same_pixels(family.process, wanted)


def test_sizes_under_older_names() -> None:
    """Some files have bounds in `size` by the names of version 4.4x."""
    size = {"min_pixels": 28 * 28 * 9, "max_pixels": 28 * 28 * 10}
    vision = {"vision_config": {}}
    assert Qwen.of(vision, {"size": size}) == Qwen.of(vision, size)
    # What stands beside `size` counts.
    both = {"size": {"shortest_edge": 1, "longest_edge": 9999}, **size}
    assert Qwen.of(vision, both) == Qwen.of(vision, size)


def test_windows_are_whole_rows() -> None:
    tower = {"patch_size": 4, "window_size": 24}
    inputs = Qwen.of({"vision_config": tower}, {}, WINDOWS).process(draw("noise", 100, 60)).inputs
    begin, end = inputs["local"]
    lines, columns = inputs["rotary"] // (2 * 3)
    for row in range(len(begin)):
        near = (lines == lines[row]) & (columns == columns[row])
        assert np.flatnonzero(near).tolist() == list(range(begin[row], end[row]))


def test_a_longest_edge() -> None:
    family = Qwen.of({"vision_config": {}}, {"max_edge": 280})
    assert family.process(draw("text", 560, 1120)).grid == (10, 5)
    assert family.process(draw("text", 140, 56)).grid == (2, 5)
    assert family.process(draw("text", 4000, 30)).grid == (1, 24)


@pytest.mark.parametrize("size", [(201, 1), (2, 401), (4000, 19)])
def test_too_long_for_its_width(size: tuple[int, int]) -> None:
    family = Qwen.of({"vision_config": {}}, {})
    with pytest.raises(InvalidRequest, match=rf"{size[0]} x {size[1]} pixels.*at most 200 times"):
        family.process(draw("text", *size))
    assert family.process(draw("text", 200, 1)).rows


def test_positions_of_random_mixes() -> None:
    model = transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(**config(TOWER | {"depth": 1}))
    )
    rng = np.random.default_rng(5)
    for _ in range(50):
        ids, grids, found = [1] * int(rng.integers(0, 4)), [], []
        for _ in range(int(rng.integers(1, 5))):
            height, width = map(int, rng.integers(1, 9, 2))
            found.append(Run(len(grids), len(ids), len(ids) + height * width, 0))
            grids.append((height, width))
            ids += [80] * (height * width) + [5] * int(rng.integers(1, 9))
        del ids[found[-1].stop + int(rng.integers(0, 2)) :]
        tokens = torch.tensor([ids])
        thw = torch.tensor([[1, 2 * height, 2 * width] for height, width in grids])
        wanted, delta = model.model.get_rope_index(tokens, (tokens == 80).int(), thw)
        places = rope_positions(len(ids), found, grids)
        assert places.dtype == np.int32
        assert (places == wanted[:, 0].numpy()).all()
        assert places.max() + 1 == len(ids) + int(delta)
    assert (rope_positions(3, [], []) == np.arange(3)).all()


def flat(tower: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A config.json of the first versions: what the text is stands beside the tower."""
    text = {k: v for k, v in INNER.items() if k != "rope_parameters"}
    text |= {"rope_theta": 1000.0, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 2]}}
    return {"vision_config": tower, "video_token_id": 83, **text, **IDS, **changed}


@pytest.mark.parametrize("name", ["2", "2.5"])
@pytest.mark.parametrize("tied", [False, True])
def test_early_files(
    name: str, tied: bool, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = next(c for c in CASES if c.name == name), name == "2.5"
    inner = old.config | {"tie_word_embeddings": tied}
    made = build(replace(old, config=inner), tmp_path)
    kind = "qwen2_5_vl" if new else "qwen2_vl"
    tower = (WINDOWED if new else TOWER) | {"model_type": kind, "in_chans": 3}
    tower |= {"spatial_patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tower |= {"tokens_per_second": 2} if new else {}
    more = {"vision_token_id": 84, "torch_dtype": "bfloat16", "transformers_version": "4.41.2"}
    metadata = flat(tower, model_type=kind, architectures=[old.model], tie_word_embeddings=tied)
    metadata |= more
    caplog.clear()
    recipe = load(replace(made.checkpoint, metadata=metadata))
    assert recipe.parts == made.recipe.parts
    assert recipe.decoder.tied == tied
    told = {name for record in caplog.records for name in str(record.args).split("'")[1::2]}
    assert told <= {"in_chans", "spatial_patch_size", "vision_token_id"}
    check_answers(replace(made, recipe=recipe), [[1, draw("text", 40, 30), 6]], drawn=3)


INVALID: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"embed_dim": 25}, {}),
    ({"embed_dim": 18}, {}),
    ({"num_heads": 0}, {}),
    ({"patch_size": 0}, {}),
    ({"patch_size": 5}, {}),
    ({"patch_size": [4, 4]}, {}),
    ({"temporal_patch_size": 1}, {}),
    ({"spatial_merge_size": 3}, {}),
    ({"depth": 10**9}, {}),
    ({"hidden_size": 41}, {}),
    ({"mlp_ratio": 2.5}, {}),
    ({}, {"rope_parameters": ROPE | {"mrope_section": [1, 2, 3]}}),
    ({}, {"rope_parameters": ROPE | {"mrope_section": [3, 2]}}),
    ({}, {"rope_parameters": ROPE | {"mrope_section": "x"}}),
    ({}, {"rope_parameters": ROPE | {"mrope_section": [5, 0, 0]}}),
    ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}),
]


@pytest.mark.parametrize(("tower", "text"), INVALID, ids=str)
def test_refused_configs(small: Seen, tower: dict[str, Any], text: dict[str, Any]) -> None:
    metadata = {"architectures": [OLD], **config(TOWER | tower, **text)}
    with pytest.raises((InvalidCheckpoint, UnsupportedModel)):
        load(replace(small.checkpoint, metadata=metadata))


@pytest.mark.parametrize(
    ("vision", "processor"),
    [
        ({}, {"min_pixels": -1}),
        ({}, {"min_pixels": 1 << 25}),
        ({}, {"max_pixels": "many"}),
        ({}, {"size": {"shortest_edge": 1.5}}),
        ({}, {"size": {"longest_edge": 1 << 70}}),
        ({}, {"image_mean": [0.5]}),
        ({}, {"do_resize": False}),
        ({"patch_size": 0}, {}),
        ({"patch_size": True}, {}),
        ({"spatial_merge_size": 99}, {}),
        ({"temporal_patch_size": 1 << 30}, {}),
        ({"window_size": 27}, {}),
    ],
    ids=str,
)
def test_refused_processors(vision: dict[str, Any], processor: dict[str, Any]) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"\w+ is .*; it must be"):
        Qwen.of({"vision_config": vision}, processor, WINDOWS)


@pytest.mark.parametrize(
    "tower",
    [{"window_size": 0}, {"fullatt_block_indexes": [3]}, {"fullatt_block_indexes": "all"},
     {"out_hidden_size": 48}, {"intermediate_size": 35}],
    ids=str,
)  # fmt: skip
def test_refused_windows(tower: dict[str, Any], windowed: Seen) -> None:
    metadata = {"architectures": [NEW], **config(WINDOWED | tower)}
    with pytest.raises(InvalidCheckpoint):
        load(replace(windowed.checkpoint, metadata=metadata))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(next(c for c in CASES if c.name == "2.5"), tmp_path_factory.mktemp("windowed"))
