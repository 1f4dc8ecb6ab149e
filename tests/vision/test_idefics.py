"""Idefics 2, Idefics 3 and SmolVLM: pixels, rows and answers as transformers has them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
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

from squall.checkpoints.folder import open_folder
from squall.errors import InvalidCheckpoint
from squall.recipes import load
from squall.vision.families import FAMILIES
from squall.vision.idefics import FAKE, Idefics2

VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 28, "patch_size": 7, "layer_norm_eps": 0.01,
}  # fmt: skip
PERCEIVER: dict[str, Any] = {
    "hidden_size": 40, "resampler_n_latents": 7, "resampler_depth": 2, "resampler_n_heads": 4,
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
    model = f"{model}ForConditionalGeneration"
    pil = model.replace("ForConditionalGeneration", "ImageProcessorPil")
    return Seer(name, model, config, FAMILIES[model], pil, SIZES3 | processor, IDS)


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


def unpadded(found: Any, patch: int) -> NDArray[np.float32]:
    """The whole patches of frames, without what makes them as large as each other."""
    frames = zip(found["pixel_values"][0], found["pixel_attention_mask"][0], strict=True)
    return np.concatenate(
        [unfold(frame[None, :, : m.any(1).sum(), : m.any(0).sum()], patch) for frame, m in frames]
    )


# As published, but for what says nothing.
IDEFICS2: dict[str, Any] = {
    "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "image_processor_type": "Idefics2ImageProcessor", "resample": 2, "rescale_factor": 1 / 255,
    "size": {"longest_edge": 980, "shortest_edge": 378},
}  # fmt: skip
IDEFICS3: dict[str, Any] = {
    **IDEFICS2, "image_processor_type": "Idefics3ImageProcessor", "resample": 1,
    "max_image_size": {"longest_edge": 364}, "size": {"longest_edge": 1456},
}  # fmt: skip
SMOLVLM: dict[str, Any] = {
    **IDEFICS3, "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048},
}  # fmt: skip


@pytest.mark.parametrize("split", [False, True])
def test_processor_of_idefics2(split: bool) -> None:
    processor = SIZES2 | {"do_image_splitting": split}
    family = Idefics2.of({"vision_config": VISION, "perceiver_config": PERCEIVER}, processor)
    pil = transformers.Idefics2ImageProcessorPil(**processor)
    wide = draw("text", 9, 7)

    def thick(image: Image.Image) -> Image.Image:
        return wide if split and min(image.size) == 1 else image  # which fail there

    same_pixels(
        lambda image: family.process(thick(image)),
        lambda image: unpadded(pil(thick(image)), 7),
    )
    for image in PICTURES.values():
        found = family.process(image)
        assert found.rows == 7 * (5 if split else 1) == found.text.count("<image>")
        assert found.text.replace("<image>" * 7, "i").replace(FAKE, "f") == "f" + "if" * (
            5 if split else 1
        )


@pytest.mark.parametrize("kind", ["Idefics3", "SmolVLM"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("sizes", [SIZES3, SIZES3 | {"size": {"longest_edge": 99}}])
def test_processor_of_idefics3(kind: str, split: bool, sizes: dict[str, Any]) -> None:
    processor = sizes | {"do_image_splitting": split}
    config = {"vision_config": VISION, "scale_factor": 2}
    family = FAMILIES[f"{kind}ForConditionalGeneration"](config, processor)
    pil = getattr(transformers, f"{kind}ImageProcessorPil")(**processor)
    same_pixels(family.process, lambda image: unfold(np.array(pil(image)["pixel_values"][0]), 7))
    said = {"fake_image_token": FAKE, "image_token": "<image>", "image_seq_len": 4}
    said |= {"global_image_tag": "<global-img>", "global_image_token": "<global-img>"}
    for image in PICTURES.values():
        found = family.process(image)
        wanted = pil(image, return_row_col_info=True)
        assert found.text == expansion(f"{kind}Processor", wanted, **said)
        assert found.rows == 4 * len(wanted["pixel_values"][0])


@pytest.mark.parametrize(
    ("model", "vision", "processor", "rows"),
    [
        ("Idefics2", {"image_size": 980, "patch_size": 14}, IDEFICS2, 320),
        ("Idefics3", {"image_size": 364, "patch_size": 14}, IDEFICS3, 169 * 13),
        ("Idefics3", {"image_size": 512, "patch_size": 16}, SMOLVLM, 256 * 13),
    ],
)
def test_published_processors(
    model: str, vision: dict[str, Any], processor: dict[str, Any], rows: int
) -> None:
    family = FAMILIES[f"{model}ForConditionalGeneration"]({"vision_config": vision}, processor)
    image = draw("gradient", 1200, 800)
    found = family.process(image)
    wanted = getattr(transformers, f"{model}ImageProcessorPil")(**processor)(image)
    assert found.rows == rows
    assert np.abs(found.inputs["patches"] - unpadded(wanted, vision["patch_size"])).max() < 1e-5


@pytest.mark.parametrize("side", [26, 27, 32, 70])
@pytest.mark.parametrize("shape", [(26, 26), (27, 52), (70, 27), (1, 32), (61, 68)])
def test_positions_are_fractions_of_the_picture(side: int, shape: tuple[int, int]) -> None:
    import torch
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    from squall.vision.rows import positions

    config = transformers.Idefics2VisionConfig(image_size=side, patch_size=1, hidden_size=1)
    made, seen = Idefics2VisionEmbeddings(config), []
    made.position_embedding.register_forward_pre_hook(lambda _, ids: seen.append(ids[0]))
    made(torch.zeros(1, 3, *shape), torch.ones(1, *shape, dtype=torch.bool))
    assert np.array_equal(positions(*shape, side), seen[0][0].numpy())


@pytest.mark.parametrize(
    ("model", "processor", "says"),
    [
        ("Idefics2", {"size": {"shortest_edge": 6, "longest_edge": 37}}, "must hold a patch"),
        ("Idefics2", {"size": {"shortest_edge": 38, "longest_edge": 37}}, "from 38 to 37"),
        ("Idefics2", {"size": {"shortest_edge": 8, "longest_edge": 10**9}}, "longest_edge is 1"),
        ("Idefics2", {"size": {"height": 8, "width": 8}}, "shortest_edge is None"),
        ("Idefics2", {"do_resize": False}, "do_resize"),
        ("Idefics2", {"image_mean": 1}, "image_mean"),
        ("Idefics3", {"do_resize": False}, "do_resize"),
        ("Idefics3", {"size": {"longest_edge": 10**6}}, "longest_edge is 1"),
        ("Idefics3", {"size": {"longest_edge": 900}}, "a 16th of 900"),
        ("Idefics3", {"max_image_size": {"longest_edge": 6}}, "max_image_size is 6"),
        ("Idefics3", {"max_image_size": {"longest_edge": 22}}, "a multiple of 2 patches"),
        ("Idefics3", {"max_image_size": {"longest_edge": 1.5}}, "longest_edge is 1.5"),
    ],
)
def test_processors_that_cannot_be(model: str, processor: dict[str, Any], says: str) -> None:
    sizes = SIZES2 if model == "Idefics2" else SIZES3
    with pytest.raises(InvalidCheckpoint, match=says):
        FAMILIES[f"{model}ForConditionalGeneration"]({"vision_config": VISION}, sizes | processor)


def test_a_smaller_picture_first() -> None:
    config = {"vision_config": VISION, "perceiver_config": PERCEIVER}
    family = partial(Idefics2.of, config)
    image = draw("text", 36, 24)
    small = image.resize((18, 12), Image.Resampling.BICUBIC)
    found = family(SIZES2 | {"max_edge": 18}).process(image)
    assert np.array_equal(found.inputs["patches"], family(SIZES2).process(small).inputs["patches"])


# The keys of config.json as published; the sizes are smaller.
LLAMA: dict[str, Any] = {
    **TEXT, "_flash_attn_2_enabled": True, "architectures": ["VLlama3ForCausalLM"],
    "head_dim": 10, "is_llama_config": True, "neftune_noise_alpha": 0.0, "perceiver_config": {
        "model_type": "vllama3", "resampler_depth": 6, "resampler_n_latents": 64},
    "pixel_shuffle_factor": 4, "qk_layer_norms": False, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_resampler": False, "transformers.js_config": {"dtype": "q4"},
}  # fmt: skip
TILED = {
    "max_image_size": {"longest_edge": 28}, "size": {"longest_edge": 112},
    "tie_word_embeddings": False, "use_base_siglip": True,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "HuggingFaceM4/idefics2-8b": {
        "architectures": ["Idefics2ForConditionalGeneration"], "image_token_id": 80,
        "model_type": "idefics2", "perceiver_config": {"model_type": "idefics2"},
        "text_config": {**TEXT, "model_type": "mistral"}, "tie_word_embeddings": False,
        "transformers_version": "4.40.0.dev0", "use_cache": True,
        "vision_config": {**VISION, "model_type": "idefics2"}},
    "HuggingFaceTB/SmolVLM-256M-Instruct": {
        "architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": 80,
        "model_type": "idefics3", "scale_factor": 4, "text_config": LLAMA,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 90,
        "transformers_version": "4.46.0", "use_cache": True, "use_reentrant_checkpointing": False,
        "vision_config": {**VISION, **TILED, "model_type": "idefics3"}},
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": {
        "architectures": ["SmolVLMForConditionalGeneration"], "image_token_id": 80,
        "model_type": "smolvlm", "pad_token_id": 2, "scale_factor": 4, "text_config": LLAMA,
        "tie_word_embeddings": False, "vocab_size": 90, "transformers_version": "4.47.1",
        "vision_config": {**VISION, **TILED, "model_type": "smolvlm_vision"}},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, tmp_path: Path) -> None:
    config = PUBLISHED[name]
    (model,) = config["architectures"]
    processor = SIZES2 if "Idefics2" in model else SIZES3 | {"max_image_size": {"longest_edge": 28}}
    pil = model.replace("ForConditionalGeneration", "ImageProcessorPil")
    seen = build(Seer(name, model, config, FAMILIES[model], pil, processor, IDS), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_folder(tmp_path)
    family = FAMILIES[model](config, processor)
    again = replace(seen, checkpoint=checkpoint, recipe=load(checkpoint), family=family)
    check_rows(again, [draw("text", 40, 30)])
    check_answers(again, [[1, draw("text", 40, 30), 6]], drawn=2)
