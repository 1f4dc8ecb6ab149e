"""GGUF models with mmproj files: rows and answers as transformers has them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mmproj_files import write_mmproj, write_text
from pictures import PICTURES, draw
from seeing import Seen, Seer, check_answers, check_rows, distance, features, randomize
from test_qwen_vl import kinds as qwen_kinds
from test_qwen_vl import positions

from squall.checkpoints import open_gguf
from squall.recipes import load, mmproj, seeing
from squall.vision import families

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TEXT: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 90, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "pad_token_id": 0,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 7, "layer_norm_eps": 0.01,
}  # fmt: skip
GEMMA: dict[str, Any] = TEXT | {
    "model_type": "gemma3_text", "num_hidden_layers": 3, "head_dim": 16,
    "query_pre_attn_scalar": 16, "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
QWEN_TEXT = {k: v for k, v in TEXT.items() if k != "model_type"} | {"rope_parameters": QWEN_ROPE}
QWEN_IDS = {
    "image_token_id": 80, "vision_start_token_id": 81, "vision_end_token_id": 82,
    "video_token_id": 83,
}  # fmt: skip
QWEN_TOWER: dict[str, Any] = {
    "depth": 4, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
}  # fmt: skip
WINDOWED: dict[str, Any] = {
    "depth": 4, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 64,
    "patch_size": 4, "window_size": 112, "fullatt_block_indexes": [1, 3],
}  # fmt: skip
FAKE = "<fake_token_around_image>"
IDEFICS_IDS = {"<image>": 80, FAKE: 81, "<global-img>": 82, "\n": 83, "\n\n": 84} | {
    f"<row_{y}_col_{x}>": 60 + 4 * y + x for y in range(1, 5) for x in range(1, 5)
}
GEMMA_IDS = {"<start_of_image>": 80, "<end_of_image>": 81, "<image_soft_token>": 82, "\n\n": 83}
POINTS = [[28, 56], [56, 28], [56, 56], [84, 28]]


@dataclass(frozen=True)
class Pair:
    """A model, and what its text's GGUF file says. architecture: of that file."""

    seer: Seer
    architecture: str = "llama"
    extra: dict[str, Any] = field(default_factory=dict)


def seer(
    name: str, model: str, pil: str, processor: dict[str, Any], config: dict[str, Any], **more: Any
) -> Seer:
    kind = f"{model}ForConditionalGeneration"
    return Seer(name, kind, config, None, f"{pil}ImageProcessorPil", processor, **more)  # type: ignore[arg-type]


def llava(name: str, vision: dict[str, Any], **more: Any) -> Pair:
    square = {"height": 28, "width": 28}
    processor = {
        "size": {"shortest_edge": 28}, "crop_size": square, "do_pad": True,
        **(HALF if "siglip" in vision["model_type"] else CLIP),
    }  # fmt: skip
    config = {"vision_config": vision, "text_config": TEXT, "image_token_index": 80, **more}
    return Pair(seer(name, "Llava", "Llava", processor, config))


def kinds(ids: torch.Tensor) -> dict[str, Any]:
    return {"token_type_ids": (ids == 82).int()}


def qwen(name: str, tower: dict[str, Any]) -> Pair:
    model = "Qwen2VL" if "embed_dim" in tower else "Qwen2_5_VL"
    config = {"vision_config": tower, "text_config": QWEN_TEXT, **QWEN_IDS}
    made = seer(
        name, model, "Qwen2VL", {**CLIP, "patch_size": 4, "min_pixels": 3136}, config,
        specials={"<|image_pad|>": 80}, more=qwen_kinds, rotary=positions, context=4096,
    )  # fmt: skip
    return Pair(made, "qwen2vl", {"rope.dimension_sections": [2, 3, 3, 0]})


CLIP_TOWER = TOWER | {"model_type": "clip_vision_model"}
SIGLIP_TOWER = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
PAIRS = [
    llava("llava", CLIP_TOWER),
    llava("llava-gelu", CLIP_TOWER | {"hidden_act": "gelu"}),
    llava(
        "llava-siglip",
        SIGLIP_TOWER,
        vision_feature_layer=[1, -1],
        vision_feature_select_strategy="full",
    ),
    Pair(
        seer(
            "llava-next", "LlavaNext", "LlavaNext",
            {
                "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
                "image_grid_pinpoints": POINTS, **CLIP,
            },
            {
                "vision_config": CLIP_TOWER, "text_config": TEXT, "image_token_index": 80,
                "image_grid_pinpoints": POINTS,
            },
        )
    ),
    qwen("qwen2vl", QWEN_TOWER),
    qwen("qwen2.5vl", WINDOWED),
    Pair(
        seer(
            "gemma3", "Gemma3", "Gemma3", {"size": {"height": 28, "width": 28}, **HALF},
            {
                "vision_config": SIGLIP_TOWER, "text_config": GEMMA, "mm_tokens_per_image": 4,
                "boi_token_index": 80, "eoi_token_index": 81, "image_token_index": 82,
            },
            specials=GEMMA_IDS, more=kinds,
        ),
        "gemma3", {"attention.sliding_window_pattern": [True, False, True]},
    ),
    Pair(
        seer(
            "smolvlm", "SmolVLM", "SmolVLM",
            {"size": {"longest_edge": 60}, "max_image_size": {"longest_edge": 28}, **HALF},
            {
                "vision_config": TOWER, "text_config": TEXT, "scale_factor": 2,
                "image_token_id": 80,
            },
            specials=IDEFICS_IDS,
        )
    ),
]  # fmt: skip


def opened(pair: Pair, model: Any, folder: Path, form: str = "f32") -> Seen:
    """What Squall makes of both files."""
    text, tower = folder / "text.gguf", folder / f"mmproj-{form}.gguf"
    if not text.exists():
        write_text(model, pair.architecture, text, pair.extra)
    write_mmproj(model, pair.seer.processor, tower, form)
    beside = {mmproj.SOURCE: mmproj.opened(open_gguf(tower))}
    checkpoint = replace(open_gguf(text), beside=beside)
    recipe = seeing(load(checkpoint), beside[mmproj.SOURCE])
    family = families.family(recipe.architecture, checkpoint)
    return Seen(pair.seer, model, checkpoint, recipe, family)


@dataclass(frozen=True)
class Made:
    pair: Pair
    model: Any
    folder: Path

    def open(self, form: str = "f32") -> Seen:
        return opened(self.pair, self.model, self.folder, form)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: str(pair.seer))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    pair = request.param
    return Made(pair, randomize(pair.seer), tmp_path_factory.mktemp("mmproj"))


def test_rows(made: Made) -> None:
    seen = made.open()
    pictures = [image for image in PICTURES.values() if 8 < min(image.size) < max(image.size) < 500]
    check_rows(seen, pictures[::4])


def test_answers(made: Made) -> None:
    first, second = draw("text", 60, 40), draw("gradient", 30, 50)
    check_answers(made.open(), [[1, 5, first, 6], [7, second, 8]], drawn=4)


@pytest.mark.parametrize(("form", "close"), [("f16", 0.02), ("q8_0", 0.2)])
def test_smaller_formats(made: Made, form: str, close: float) -> None:
    seen, image = made.open(form), draw("text", 60, 40)
    assert 1e-6 < distance(seen.rows(image), features(seen, image)) < close
