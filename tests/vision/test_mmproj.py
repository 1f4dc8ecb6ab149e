"""GGUF models with mmproj files: rows and answers as transformers has them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmproj_files import Change, write_mmproj, write_text
from pictures import PICTURES, draw
from PIL import Image
from seeing import Floats, Seen, Seer, check_answers, check_rows, distance, features, randomize
from test_qwen_vl import kinds as qwen_kinds
from test_qwen_vl import positions
from typer.testing import CliRunner

from squall import Model
from squall.checkpoints import open_gguf
from squall.checkpoints.base import ByteTensor, Deferred
from squall.cli.app import app
from squall.errors import (
    InvalidCheckpoint,
    InvalidRequest,
    ModelNotFound,
    SquallError,
    UnsupportedModel,
)
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


def pixtral(name: str, model: str, **more: Any) -> Pair:
    edge = 4 * more.get("spatial_merge_size", 1)
    processor = {
        "size": {"longest_edge": 64}, "patch_size": {"height": edge, "width": edge}, **CLIP
    }  # fmt: skip
    text = TEXT | {"model_type": "mistral", "sliding_window": None}
    config = {"vision_config": PIXTRAL_TOWER, "text_config": text, "image_token_index": 80, **more}
    return Pair(seer(name, model, "Pixtral", processor, config, specials=PIXTRAL_IDS))


PIXTRAL_IDS = {"[IMG]": 80, "[IMG_BREAK]": 81, "[IMG_END]": 82}
PIXTRAL_TOWER: dict[str, Any] = {
    "model_type": "pixtral", "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 64, "patch_size": 4, "image_size": 64, "hidden_act": "silu",
}  # fmt: skip
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
    pixtral("mistral3", "Mistral3", spatial_merge_size=2, tie_word_embeddings=False),
    pixtral(
        "pixtral", "Llava", vision_feature_layer=-1, vision_feature_select_strategy="full"
    ),
]  # fmt: skip


def opened(
    pair: Pair, model: Any, folder: Path, form: str = "f32", change: Change = lambda *_: None
) -> Seen:
    """What Squall makes of both files."""
    text, tower = folder / "text.gguf", folder / f"mmproj-{form}.gguf"
    if not text.exists():
        write_text(model, pair.architecture, text, pair.extra)
    write_mmproj(model, pair.seer.processor, tower, form, change)
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


def test_what_other_versions_of_the_converter_write(tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        metadata |= {"clip.has_qwen2vl_merger": True, "clip.vision.image_max_pixels": 5000}
        metadata["clip.vision.feed_forward_length"] = 0
        for layer, kind in itertools.product(range(4), ("weight", "bias")):
            before = f"v.blk.{layer}."
            parts = [tensors.pop(f"{before}attn_{part}.{kind}") for part in "qkv"]
            tensors[f"{before}attn_qkv.{kind}"] = np.concatenate(parts)
            names = [f"{before}ffn_{way}.{kind}" for way in ("up", "down")]
            up, down = (tensors.pop(name) for name in names)
            tensors |= dict(zip(names, (down, up), strict=True))

    pair = qwen("other", QWEN_TOWER)
    seer = replace(pair.seer, processor={**pair.seer.processor, "max_pixels": 5000})
    seen = opened(replace(pair, seer=seer), randomize(seer), tmp_path, change=change)
    check_rows(seen, [draw("text", 200, 100)])


# ---- files that lie ----

WRONG: list[Any] = [
    None, 0, -1, 1, 3, 1 << 31, (1 << 63) - 1, True, False, "", "x", 0.0, float("nan"), 1e30, [],
    ["a"], [0], np.zeros(3, np.float32), np.arange(5, dtype=np.int32), np.full(300, 28, np.int32),
]  # fmt: skip
HOSTILE = [pair for pair in PAIRS if pair.seer.name in ("llava-next", "qwen2.5vl", "smolvlm")]


@pytest.fixture(scope="module", params=HOSTILE, ids=lambda pair: str(pair.seer))
def honest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    pair = request.param
    return opened(pair, randomize(pair.seer), tmp_path_factory.mktemp("hostile"))


def see(honest: Seen, **changed: Any) -> Floats | str:
    """Rows of a picture with a changed file, or the error; others than Squall's are raised."""
    file = replace(honest.checkpoint.beside[mmproj.SOURCE], **changed)
    beside = {mmproj.SOURCE: mmproj.opened(file)}
    checkpoint = replace(honest.checkpoint, beside=beside)
    text = honest.recipe.part("decoder")
    try:
        recipe = seeing(replace(honest.recipe, parts=(text,)), beside[mmproj.SOURCE])
        family = families.family(recipe.architecture, checkpoint)
    except SquallError as error:
        return str(error)
    return Seen(honest.case, None, checkpoint, recipe, family).rows(draw("text", 60, 40))


def test_wrong_metadata(honest: Seen) -> None:
    metadata = honest.checkpoint.beside[mmproj.SOURCE].metadata
    ours = [key for key in metadata if key.startswith("clip.")]
    for key in [*ours, "general.architecture", "clip.vision.feature_layer", "clip.unknown"]:
        for value in WRONG:
            changed = {**metadata, key: value}
            if value is None:
                changed.pop(key, None)
            found = see(honest, metadata=changed)
            assert isinstance(found, str) or np.isfinite(found).all(), (key, value)


def test_what_must_be_said(honest: Seen) -> None:
    metadata = honest.checkpoint.beside[mmproj.SOURCE].metadata
    needed = "block_count embedding_length attention.head_count patch_size image_size image_mean"
    for key in needed.split():
        name = f"clip.vision.{key}"
        found = see(honest, metadata={k: v for k, v in metadata.items() if k != name})
        assert isinstance(found, str)
        assert name in found
    for key, value, why in (
        ("clip.vision.is_deepstack_layers", [True], "is_deepstack_layers', which Squall cannot"),
        ("clip.projector_type", "ldp", "mmproj file of the kind 'ldp'; known: mlp, "),
        ("general.architecture", "llama", "is no mmproj file"),
    ):
        found = see(honest, metadata={**metadata, key: value})
        assert isinstance(found, str)
        assert why in found


def test_wrong_tensors(honest: Seen) -> None:
    tensors = honest.checkpoint.beside[mmproj.SOURCE].tensors
    for name, tensor in tensors.items():
        rest = {k: t for k, t in tensors.items() if k != name}
        assert isinstance(see(honest, tensors=rest), str), name
        assert isinstance(tensor, ByteTensor | Deferred)
        for shape in ((), (0,), (1,), tensor.shape[:-1], (*tensor.shape, 2), (7, *tensor.shape)):
            wrong = replace(tensor, shape=shape)
            assert isinstance(see(honest, tensors={**rest, name: wrong}), str), (name, shape)
        more = {**tensors, f"v.{name}": replace(tensor, name=f"v.{name}")}
        assert "does not use" in str(see(honest, tensors=more))


def test_frames_of_different_shapes(honest: Seen) -> None:
    tensors, name = honest.checkpoint.beside[mmproj.SOURCE].tensors, "v.patch_embd.weight"
    second = replace(tensors[name], name=f"{name}.1", shape=(1, 2))  # type: ignore[type-var]
    with pytest.raises(InvalidCheckpoint, match="differ in shape"):
        see(honest, tensors={**tensors, f"{name}.1": second})


# ---- opening ----

LETTERS = [chr(n) for n in range(ord("a"), ord("z") + 1)]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *LETTERS]
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [-float(n) for n in range(len(TOKENS))],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(LETTERS)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
VICUNA = llava("vicuna", CLIP_TOWER)
IMAGE_ID = len(TOKENS)  # which transformers' model has, and the file's vocabulary has not


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = {
        **VICUNA.seer.config, "image_token_index": IMAGE_ID,
        "text_config": TEXT | {"vocab_size": IMAGE_ID + 1, "max_position_embeddings": 2048},
    }  # fmt: skip
    model, folder = randomize(replace(VICUNA.seer, config=config)), tmp_path_factory.mktemp("open")
    embeddings = model.get_input_embeddings()
    write_mmproj(model, VICUNA.seer.processor, folder / "mmproj-f32.gguf")
    write_text(model, "llama", folder / "text.gguf", VOCABULARY, rows=IMAGE_ID)
    assert embeddings.weight.shape[0] == IMAGE_ID + 1
    return Made(VICUNA, model, folder)


def ask(image: Image.Image) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    return [{"role": "user", "content": parts}]


def test_a_vocabulary_without_a_token_for_images(vicuna: Made) -> None:
    picture = draw("text", 60, 40)
    with Model.open(vicuna.folder, weights="f32", kv_dtype="f32", threads=1) as model:
        ids = model.encode_prompt(model.chat_prompt(ask(picture)))
        assert ids.count(0) == 16
        answer = model.generate(ask(picture), max_tokens=6, temperature=0, ignore_eos=True)
        answer.read()
    found = answer.ids
    assert len(found) == 6
    wanted = torch.tensor([[IMAGE_ID if i == 0 else i for i in ids]])
    pixels = vicuna.pair.seer.pixels([picture])
    for token in found:
        with torch.no_grad():
            logits = vicuna.model(input_ids=wanted, **pixels).logits[0, -1, :IMAGE_ID]
        assert int(logits.argmax()) == token
        wanted = torch.cat([wanted, torch.tensor([[token]])], 1)


def test_text_alone(tmp_path: Path) -> None:
    """Positions with axes, and where one says nothing, are those of text."""
    pair = qwen("words", QWEN_TOWER)
    text = {**QWEN_TEXT, "vocab_size": IMAGE_ID}
    model = randomize(replace(pair.seer, config={**pair.seer.config, "text_config": text}))
    write_text(model, "qwen2vl", tmp_path / "text.gguf", {**pair.extra, **VOCABULARY})
    write_mmproj(model, pair.seer.processor, tmp_path / "mmproj.gguf")
    ids, exact = list(range(40, 60)), dict[str, Any](weights="f32", kv_dtype="f32", threads=1)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    found = []
    for tower in (None, "none"):
        with Model.open(tmp_path / "text.gguf", mmproj=tower, **exact) as opened:
            assert (opened.sight is None) == (tower == "none")
            found.append(opened.logits(ids))
    assert distance(found[0], wanted) < 1e-4
    assert found[0].tobytes() == found[1].tobytes()


def test_which_tower(vicuna: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text, tower = (tmp_path / name for name in ("text.gguf", "mmproj-a.gguf"))
    for path, name in ((text, "text.gguf"), (tower, "mmproj-f32.gguf")):
        path.write_bytes((vicuna.folder / name).read_bytes())
    narrow = llava("narrow", CLIP_TOWER)
    config = {**narrow.seer.config, "text_config": TEXT | {"hidden_size": 32}}
    other = tmp_path / "other-mmproj.gguf"
    write_mmproj(randomize(replace(narrow.seer, config=config)), narrow.seer.processor, other)

    def sees(**options: Any) -> bool:
        with Model.open(text, threads=1, **options) as model:
            return model.sight is not None

    caplog.set_level("INFO", "squall")
    assert sees()
    assert "other-mmproj.gguf is left out" in caplog.text
    assert not sees(mmproj="none")
    with pytest.raises(InvalidCheckpoint, match=r"rows of 32 values.*64: it belongs to another"):
        sees(mmproj=other)
    with pytest.raises(InvalidCheckpoint, match=r"'text\.gguf' is no mmproj file"):
        sees(mmproj=text)
    with pytest.raises(ModelNotFound, match="does not exist"):
        sees(mmproj=tmp_path / "missing.gguf")
    (tmp_path / "MMPROJ-b.gguf").write_bytes(tower.read_bytes())
    with pytest.raises(InvalidRequest, match=r"several .*: MMPROJ-b\.gguf, mmproj-a\.gguf"):
        sees()
    assert sees(mmproj=tower)
    told = CliRunner().invoke(app, ["inspect", str(tower)])
    assert "the tower of a model that sees (mmproj, 'mlp')" in " ".join(told.stdout.split())
    with pytest.raises(UnsupportedModel, match=r"the tower of a model that sees .mmproj, 'mlp'."):
        Model.open(tower)
