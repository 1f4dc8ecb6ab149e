"""Llama 3.2 Vision: pixels, rows and answers as transformers has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutate import mutations
from pictures import PICTURES, draw
from PIL import Image
from seeing import (
    BLOCK,
    CLOSE,
    Floats,
    Part_,
    Seen,
    Seer,
    build,
    distance,
    given,
    run,
    unfold,
    unmoved,
)
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from squall import decoder, executors
from squall.batch import Batch
from squall.errors import InvalidCheckpoint
from squall.executors import Executor, Limits, Memory
from squall.recipes import load
from squall.spec import Decoder
from squall.vision import memory
from squall.vision.mllama import Mllama

IMAGE, VOCAB, TILE, ROWS = 160, 160, 42, 10
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
    "rms_norm_eps": 0.01, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_global_layers": 2,
    "attention_heads": 4, "image_size": TILE, "patch_size": 14, "vision_output_dim": 192,
    "intermediate_layers_indices": [0, 2], "norm_eps": 0.01, "max_num_tiles": 4,
}  # fmt: skip
PROCESSOR: dict[str, Any] = {
    "size": {"height": TILE, "width": TILE}, "max_image_tiles": 4,
    "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.27, 0.28],
}  # fmt: skip
MODEL, PIL = "MllamaForConditionalGeneration", "MllamaImageProcessorPil"


def config(text: dict[str, Any] = TEXT, vision: dict[str, Any] = VISION) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, "image_token_index": IMAGE}


def published(name: str) -> str:
    """A tensor's name in the files on the hub."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    bare = name.removeprefix("model.")
    return bare.replace("language_model.", "language_model.model.", 1)


SPECIALS = {"<|image|>": IMAGE}
LAST = TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [0, 3]}
CASES = [
    Seer("mllama", MODEL, config(), Mllama.of, PIL, PROCESSOR, SPECIALS),
    Seer("mllama-hub", MODEL, config(LAST), Mllama.of, PIL, PROCESSOR, SPECIALS, published),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(request.param, tmp_path_factory.mktemp("mllama"))


def opened(
    seen: Seen, spec: Decoder | None = None, spaces: int = 256
) -> tuple[Executor, Executor]:
    """Of the decoder, and of the keys of what it recalls."""
    spec, names, pool = spec or seen.recipe.decoder, seen.recipe.names, executors.thread_pool(1)
    made = []
    for program in (
        decoder.compile(spec, names, context=seen.case.context),
        decoder.compile_memory(spec, names),
    ):
        limits = Limits(
            rows=dict.fromkeys(program.spaces, max(spaces, memory.MOST)),
            blocks=seen.case.context // BLOCK, block_size=BLOCK, kv_dtype="f32",
        )  # fmt: skip
        made.append(executors.open(program, seen.store, limits, pool=pool))
    return made[0], made[1]


def prompt(parts: Sequence[Part_]) -> tuple[list[int], list[Image.Image]]:
    ids = [part if isinstance(part, int) else IMAGE for part in parts]
    return ids, [part for part in parts if not isinstance(part, int)]


def recalled(
    seen: Seen, parts: Sequence[Part_], of: tuple[Executor, Executor]
) -> tuple[list[int], Memory | None, np.ndarray[Any, Any]]:
    """A prompt's ids, its memory, and what the ids see of it."""
    ids, images = prompt(parts)
    read = [seen.family.process(image) for image in images]
    at = memory.seen(ids, IMAGE, read)
    if not images:
        return ids, None, at
    rows = memory.ordered([(each, seen.see(each)) for each in read])
    return ids, memory.remember(of[1], of[0], rows), at


def logits(
    seen: Seen, parts: Sequence[Part_], cut: int, drawn: int, spec: Decoder | None = None
) -> tuple[list[int], Floats]:
    """Of a prompt that is computed in steps of so many tokens, and of a greedy answer."""
    of = opened(seen, spec)
    ids, recollection, at = recalled(seen, parts, of)
    size, found = len(ids), []
    tables = np.arange(seen.case.context // BLOCK, dtype=np.int32)[None, ::-1].copy()
    for start in [*range(0, size, cut), *range(size, size + drawn)]:
        if start >= size:
            ids.append(int(found[-1][-1].argmax()))
        stop = min(start + cut, size) if start < size else start + 1
        positions = np.arange(start, stop, dtype=np.int32)
        batch = Batch(
            tokens=np.array(ids[start:stop], np.int32), positions=positions,
            bounds=np.array([0, stop - start], np.int32), block_tables=tables,
            outputs=np.arange(stop - start, dtype=np.int32), memories=(recollection,),
            seen=np.ascontiguousarray(at[:, positions.clip(max=size - 1)]),
        )  # fmt: skip
        found.append(of[0].step(batch).copy())
    return ids, np.concatenate(found)


def theirs(seen: Seen, ids: list[int], images: Sequence[Image.Image], size: int) -> Floats:
    """Logits of transformers for a prompt of `size` tokens and its answer."""
    inputs: dict[str, Any] = {}
    if images:
        make = seen.case.pixels([[image for image in images]])  # type: ignore[list-item]
        tiles = [len(np.asarray(p)) for p in ()]
        inputs = make
        tiles = inputs["aspect_ratio_mask"].sum(-1)[0].tolist()
        mask = convert_sparse_cross_attention_mask_to_dense(
            [get_cross_attention_token_mask(ids[:size], IMAGE)], [tiles], 4, size
        )
        mask = np.concatenate([mask, np.repeat(mask[:, -1:], len(ids) - size, axis=1)], axis=1)
        inputs["cross_attention_mask"] = torch.tensor(mask)
    with torch.no_grad():
        out = seen.model(input_ids=torch.tensor([ids]), **inputs)
    found: Floats = out.logits[0].numpy()
    return found


def check(seen: Seen, parts: Sequence[Part_], cut: int = 64, drawn: int = 16) -> None:
    ids, found = logits(seen, parts, cut, drawn)
    wanted = theirs(seen, ids, prompt(parts)[1], len(parts))
    assert distance(found, wanted) < CLOSE
    answer = wanted[len(parts) - 1 : -1].argmax(-1)
    assert answer.tolist() == ids[len(parts) :]


def test_processor(seen: Seen) -> None:
    for name, picture in PICTURES.items():
        made, found = seen.case.pixels([picture]), seen.family.process(picture)
        tiles, shape = int(made["aspect_ratio_mask"].sum()), int(made["aspect_ratio_ids"])
        right = unfold(made["pixel_values"][0, 0, :tiles].numpy(), 14)
        real = found.inputs["positions"][: tiles * ROWS] > 0
        pixels = found.inputs["patches"]
        assert np.abs(pixels[: tiles * ROWS][real] - right).max() < 1e-5, name
        assert not pixels[tiles * ROWS :].any()
        assert set(found.inputs["tile"] // 4) == {shape}, name
        assert found.recalled == (tiles * ROWS, (4 - tiles) * ROWS), name
        assert (found.text, found.rows) == ("<|image|>", 0)


def features(seen: Seen, image: Image.Image) -> Floats:
    """Rows of transformers: those of tiles with something in them, then the others."""
    with torch.no_grad():
        rows = seen.model.model.vision_model(**seen.case.pixels([image])).last_hidden_state
        return seen.model.model.multi_modal_projector(rows).reshape(-1, 128).numpy()


def test_rows(seen: Seen) -> None:
    shapes = set()
    for picture in [draw("noise", *size) for size in ((42, 84), (90, 30), (50, 50), (10, 99))]:
        processed = seen.family.process(picture)
        shapes.add(processed.recalled)
        assert distance(seen.see(processed), features(seen, picture)) < CLOSE, picture.size
    assert len(shapes) > 2


WIDE, HIGH, SQUARE = draw("gradient", 99, 20), draw("text", 40, 90), draw("noise", 70, 75)


@pytest.mark.parametrize(
    "parts",
    [
        [1, 5, 6, 7, 8],
        [1, WIDE, 6, 7, 8],
        [1, 5, 6, WIDE, 7, 8],
        [1, 5, WIDE, HIGH, 7, 8, 9],
        [1, 5, WIDE, 6, 7, HIGH, SQUARE, 8, 9],
        [WIDE, 1, 5, 6, 7, 8, 9, HIGH],
        [1, 5, WIDE, 6, *range(20, 60), 7, SQUARE, 8],
    ],
    ids=["none", "one", "later", "adjacent", "apart", "ends", "second turn"],
)
def test_answers(seen: Seen, parts: Sequence[Part_]) -> None:
    check(seen, parts)
    check(seen, parts, cut=3, drawn=2)
