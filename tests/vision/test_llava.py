"""LLaVA and LLaVA-Next: pixels, rows and answers as transformers has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import PICTURES, draw
from PIL import Image
from seeing import (
    TEXT,
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

from squall import recipes
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.vision.llava import Llava, LlavaNext

SMALL: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 21, "patch_size": 7, "layer_norm_eps": 0.01,
}  # fmt: skip
CLIP = SMALL | {"model_type": "clip_vision_model"}
SIGLIP = SMALL | {"model_type": "siglip_vision_model", "image_size": 23}
ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MISTRAL = TEXT | {"model_type": "mistral", "sliding_window": 60}
QWEN = TEXT | {"model_type": "qwen2", "tie_word_embeddings": True}
GRANITE = TEXT | {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
SQUARE = {"height": 21, "width": 21}
EDGE: dict[str, Any] = {"size": {"shortest_edge": 21}, "crop_size": SQUARE}
POINTS = [[21, 42], [42, 21], [42, 42], [63, 21], [21, 63]]
ANYRES = EDGE | {"image_grid_pinpoints": POINTS}
LLAVA = ("LlavaForConditionalGeneration", Llava.of, "LlavaImageProcessorPil")
NEXT = ("LlavaNextForConditionalGeneration", LlavaNext.of, "LlavaNextImageProcessorPil")


def published(name: str) -> str:
    """As the hub's files have it, from before transformers 4.52."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def moved(name: str) -> str:
    """As transformers 4.52 and later have it in memory."""
    if name.startswith("language_model."):
        name = name.removeprefix("language_model.")
        return (
            name if name.startswith("lm_head") else name.replace("model.", "model.language_model.")
        )
    return f"model.{name}"


def seer(
    name: str,
    kind: tuple[str, Any, str],
    vision: dict[str, Any],
    text: dict[str, Any],
    processor: dict[str, Any],
    rename: Callable[[str], str] | None = None,
    **more: Any,
) -> Seer:
    model, family, pil = kind
    config = {"vision_config": vision, "text_config": text, "image_token_index": 80, **more}
    if "image_grid_pinpoints" in processor:
        config["image_grid_pinpoints"] = processor["image_grid_pinpoints"]
    return Seer(name, model, config, family, pil, processor, rename=rename)


CASES = [
    seer("llava", LLAVA, CLIP, TEXT, EDGE, published),
    seer(
        "llava-layers", LLAVA, CLIP, MISTRAL, EDGE | {"do_pad": True, "size": 21}, moved,
        vision_feature_layer=[-2, 0, 3], projector_hidden_act="relu",
        multimodal_projector_bias=False,
    ),
    seer(
        "llava-full", LLAVA, CLIP | {"hidden_act": "gelu"}, QWEN,
        EDGE | {"size": SQUARE, "resample": 2},
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    ),
    seer(
        "llava-siglip", LLAVA, SIGLIP, QWEN, {
            "size": {"height": 23, "width": 23}, "do_center_crop": False,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.4, 0.5], "resample": 1},
        vision_feature_select_strategy="full",
    ),
    seer("llava-siglip-default", LLAVA, SIGLIP | {"image_size": 21}, TEXT, EDGE, published),
    seer("next", NEXT, CLIP, MISTRAL, ANYRES, published),
    seer(
        "next-siglip", NEXT, SIGLIP | {"image_size": 21}, TEXT | {"rope_parameters": ROPE},
        ANYRES | {"size": SQUARE, "do_center_crop": False}, moved,
        vision_feature_select_strategy="full", vision_feature_layer=[1, -2],
    ),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(request.param, tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(CASES[0], tmp_path_factory.mktemp("plain"))


def test_rows(seen: Seen) -> None:
    check_rows(seen, PICTURES.values() if "next" in seen.case.name else [draw("noise", 40, 30)])


def test_answers(seen: Seen) -> None:
    first, second = draw("text", 40, 30), draw("gradient", 25, 60)
    check_answers(seen, [[1, 5, 6, 7]])
    check_answers(seen, [[1, first, 6, second, first, 7, 8]], cut=5)
    check_answers(seen, [[1, 5, first, 6], [7, second, 8]])


def test_a_language_model_that_scales_images_too(tmp_path: Path) -> None:
    case = seer(
        "granite", NEXT, SIGLIP | {"image_size": 21}, GRANITE,
        ANYRES | {"size": SQUARE, "do_center_crop": False}, published,
        vision_feature_select_strategy="full", vision_feature_layer=[-2, 0, -1],
    )  # fmt: skip
    granite, image = build(case, tmp_path), draw("text", 40, 30)
    check_answers(granite, [[1, image, 6], [7, image, 8]])
    assert not unmoved(granite, image)


def test_every_field_matters(seen: Seen) -> None:
    assert not unmoved(seen, draw("noise", 40, 30))


def test_small_pixels(seen: Seen) -> None:
    """With each case's options."""
    size = SMALL["patch_size"]
    same_pixels(
        seen.family.process,
        lambda image: unfold(seen.case.pixels([image])["pixel_values"].numpy(), size),
    )


# ---- at the sizes of published models ----

LARGE = {"vision_config": {"image_size": 336, "patch_size": 14}}
PUBLISHED: dict[str, Any] = {
    "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 336},
}  # fmt: skip
PROCESSOR = {
    "patch_size": 14, "vision_feature_select_strategy": "default", "image_token": "<image>",
    "num_additional_image_tokens": 1,
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
def test_llava_1_5(padded: bool) -> None:
    import transformers

    processor = PUBLISHED | {"do_pad": padded}
    family, theirs = Llava.of(LARGE, processor), transformers.LlavaImageProcessorPil(**processor)

    def wanted(image: Image.Image) -> Any:
        pixels = theirs(images=image)["pixel_values"]
        text = family.process(image).text
        assert text == expansion("LlavaProcessor", {"pixel_values": pixels}, **PROCESSOR)
        return unfold(pixels[0], 14)

    same_pixels(family.process, wanted)


def test_llava_next() -> None:
    import transformers

    theirs = transformers.LlavaNextImageProcessorPil(**PUBLISHED)
    family = LlavaNext.of(LARGE, PUBLISHED)

    def wanted(image: Image.Image) -> Any:
        found = theirs(images=image)
        text = family.process(image).text
        assert text == expansion("LlavaNextProcessor", found, image_processor=theirs, **PROCESSOR)
        return unfold(found["pixel_values"][0], 14)

    same_pixels(family.process, wanted)


def test_counts_of_anyres() -> None:
    """Where the rounding of what is left without padding matters: many sizes."""
    import transformers
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    from squall.vision.family import tiled
    from squall.vision.llava import best_size, unpadded

    points = transformers.LlavaNextImageProcessorPil.image_grid_pinpoints
    made = object.__new__(transformers.LlavaNextProcessor)
    made.__dict__.update(PROCESSOR, image_processor=transformers.LlavaNextImageProcessorPil())
    sizes = [(w, h) for w in range(1, 700, 13) for h in range(1, 700, 17)]
    for width, height in [*sizes, (1000, 3), (3, 1000), (1021, 509), (9999, 1)]:
        image = Image.new("L", (width, height)) if width * height < 1 << 20 else None
        assert image is not None
        lines, columns = (n // 336 for n in best_size(image, tuple(map(tuple, points))))
        grid = unpadded(tiled(24, lines, columns), image)
        rows = torch.from_numpy(tiled(24, lines, columns))[None]
        assert grid.tolist() == unpad_image(rows, (height, width))[0].tolist()
        count = grid.size + grid.shape[0] + 576
        assert count == made._get_number_of_features(height, width, 336, 336) - 1


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("config", "processor", "problem"),
    [
        ({}, {"size": {"shortest_edge": 0}}, "shortest_edge is 0"),
        ({}, {"size": {"shortest_edge": 10**9}}, "shortest_edge is 1000000000"),
        ({}, {"size": {"longest_edge": 336}}, "must have a height and a width"),
        ({}, {"size": "336"}, "must have a height and a width"),
        ({}, {"crop_size": {"height": 224, "width": 336}}, r"leave \(224, 336\)"),
        ({}, {"crop_size": 224}, r"leave \(224, 224\)"),
        ({}, {"do_center_crop": False}, "leave 336 of a picture"),
        ({}, {"do_resize": False, "do_center_crop": False}, "leave None of a picture"),
        ({"patch_size": 0}, {}, "patch_size is 0"),
        ({"image_size": True}, {}, "image_size is True"),
        ({}, {"image_mean": [1, 2]}, "image_mean is"),
    ],
)
def test_bad_numbers(config: Any, processor: Any, problem: str) -> None:
    vision = {"vision_config": LARGE["vision_config"] | config}
    with pytest.raises(InvalidCheckpoint, match=problem):
        Llava.of(vision, PUBLISHED | processor)


@pytest.mark.parametrize(
    "points", [[[336, 672], [0, 672]], [[336, 500]], [[336]], [[336, 336 * 20]], [[336, 672]] * 300]
)
def test_bad_pinpoints(points: Any) -> None:
    given = {"image_grid_pinpoints": points}
    for files in ((LARGE | given, PUBLISHED), (LARGE, PUBLISHED | given)):
        with pytest.raises(InvalidCheckpoint, match="image_grid_pinpoints must be"):
            LlavaNext.of(*files)


def test_few_tiles() -> None:
    """As `detail: low` asks for."""
    family = LlavaNext.of(LARGE, PUBLISHED | {"image_grid_pinpoints": [[336, 672]]})
    assert family.process(draw("text", 800, 600)).rows == 576 + 24 * 32 + 24


@pytest.mark.parametrize("padded", [False, True])
def test_long_images(padded: bool) -> None:
    """What would take gigabytes is refused, before anything is made of it."""
    family = Llava.of(LARGE, PUBLISHED | {"do_pad": padded})
    with pytest.raises(InvalidRequest, match="100000 x 1 pixels is too long for its width"):
        family.process(Image.new("RGB", (100000, 1)))
    found = LlavaNext.of(LARGE, PUBLISHED).process(Image.new("RGB", (100000, 1)))
    assert found.rows == 576


# ---- config.json as published ----

KEYS: dict[str, Any] = {
    "ignore_index": -100, "image_token_index": 32000, "pad_token_id": 32001,
    "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0", "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
VISION = SMALL | {"model_type": "clip_vision_model", "projection_dim": 768, "vocab_size": 32000}
VICUNA = TEXT | {
    "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float16",
}  # fmt: skip
INSTRUCT = TEXT | {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "architectures": ["MistralForCausalLM"],
    "model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text", "more"),
    [
        (LLAVA, VICUNA, {"model_type": "llava"}),
        (NEXT, VICUNA, {"model_type": "llava_next", "use_image_newline_parameter": True}),
        (
            NEXT,
            INSTRUCT,
            {
                "model_type": "llava_next",
                "image_grid_pinpoints": POINTS,
                "image_seq_length": 9,
                "multimodal_projector_bias": True,
            },
        ),
    ],
)
def test_published_keys(kind: Any, text: Any, more: Any, tmp_path: Path) -> None:
    processor = ANYRES if kind is NEXT else EDGE
    seen = build(seer(more["model_type"], kind, VISION, text, processor, published), tmp_path)
    config = (
        KEYS | more | {"architectures": [kind[0]], "text_config": text, "vision_config": VISION}
    )
    found = recipes.load(replace(seen.checkpoint, metadata=config))
    assert [part.spec for part in found.parts] == [part.spec for part in seen.recipe.parts]
    assert found.all_names == seen.recipe.all_names


@pytest.mark.parametrize(
    ("vision", "more", "problem"),
    [
        ({"model_type": "dinov2"}, {}, "vision_config is of the kind 'dinov2'; known: clip_vision"),
        ({}, {"vision_feature_layer": 7}, "vision_feature_layer is 7; it must be a number between"),
        ({}, {"vision_feature_layer": [-2, "x"]}, r"vision_feature_layer is \[-2, 'x'\]"),
        ({}, {"vision_feature_layer": []}, r"vision_feature_layer is \[\]"),
        ({}, {"projector_hidden_act": "tanh"}, "projector_hidden_act"),
        ({"hidden_act": "tanh"}, {}, "hidden_act"),
        ({"image_size": 28}, {}, "position_embedding"),
        ({"num_hidden_layers": 2}, {}, r"encoder\.layers\.2"),
    ],
)
def test_refused_configs(vision: Any, more: Any, problem: str, plain: Seen) -> None:
    config: dict[str, Any] = dict(plain.checkpoint.metadata) | more
    config["vision_config"] = config["vision_config"] | vision
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=problem):
        recipes.load(replace(plain.checkpoint, metadata=config))
