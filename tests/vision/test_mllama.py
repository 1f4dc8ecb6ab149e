"""Llama 3.2 Vision: pixels, rows and answers as transformers has them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, cast

import mllama_oracle
import numpy as np
import pytest
import torch
from mutate import mutations
from pictures import PICTURES, draw
from PIL import Image
from safetensors.torch import load_file, save_file
from seeing import BLOCK, CLOSE, MOVED, Floats, Part_, Seen, Seer, build, distance, unfold, unmoved
from test_mutations import is_equivalent

from squall import convert, decoder, executors
from squall.adapters.edits import adaptable
from squall.batch import Batch
from squall.checkpoints import open_checkpoint
from squall.checkpoints.folder import open_folder
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.executors import Executor, Limits, Memory
from squall.quant import Plan
from squall.recipes import load
from squall.recipes.linears import linears
from squall.roles import roles
from squall.spec import Decoder
from squall.vision import sight
from squall.vision.family import Processed
from squall.vision.mllama import Mllama
from squall.weights import Stored, Term

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


def of_modules(name: str) -> str:
    """What transformers calls a tensor; in files it has the name that published ones have."""
    inner = name.replace("language_model.model.", "language_model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{inner}"


SPECIALS = {"<|image|>": IMAGE}
# Small before each norm, where 1e-5 then counts.
FAINT = r"vision_model.*(patch_emb|class_emb|tile_emb|embedding\.emb|layernorm_pre|o_proj|fc2)"
LAST = TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [0, 3]}
CASES = [
    Seer("mllama", MODEL, config(), Mllama.of, PIL, PROCESSOR, SPECIALS),
    Seer(
        "modules", MODEL, config(LAST), Mllama.of, PIL, PROCESSOR, SPECIALS, of_modules, faint=FAINT
    ),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return build(request.param, tmp_path_factory.mktemp("mllama"))


def opened(seen: Seen, spec: Decoder | None = None, spaces: int = 256) -> tuple[Executor, Executor]:
    """Of the decoder, and of the keys of what it recalls."""
    spec, names, pool = spec or seen.recipe.decoder, seen.recipe.names, executors.thread_pool(1)
    made = []
    for program in (
        decoder.compile(spec, names, context=seen.case.context),
        decoder.compile_memory(spec, names),
    ):
        limits = Limits(
            rows=dict.fromkeys(program.spaces, max(spaces, sight.MOST_AT_ONCE)),
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
    at = sight.seen(ids, IMAGE, read)
    if not images:
        return ids, None, at
    rows = sight.ordered([(each, seen.see(each)) for each in read])
    return ids, sight.remember(of[1], of[0], rows), at


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


def check(seen: Seen, parts: Sequence[Part_], cut: int = 64, drawn: int = 16) -> None:
    ids, found = logits(seen, parts, cut, drawn)
    size, images = len(parts), prompt(parts)[1]
    wanted = mllama_oracle.logits(seen.model, ids[:size], ids[size:], images, PROCESSOR)
    assert distance(found, wanted) < CLOSE
    assert wanted[size - 1 : -1].argmax(-1).tolist() == ids[size:]


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
        assert (found.text, found.rows) == ("<|image|>", 1)


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


def test_steps_change_no_bit(seen: Seen) -> None:
    parts = [1, 5, WIDE, 6, 7, HIGH, SQUARE, 8, 9]
    ids, wanted = logits(seen, parts, 64, 4)
    for cut in (1, 2, 5):
        again, found = logits(seen, parts, cut, 4)
        assert again == ids
        assert np.array_equal(found, wanted), cut


def test_sequences_recall_their_own(seen: Seen) -> None:
    """In one step with others, of which one has no image, answers are what they are alone."""
    of, size = opened(seen), 6
    prompts = [[1, WIDE, 5, 6, 7, 8], [1, 9, 5, 6, 7, 8], [1, 9, 5, HIGH, SQUARE, 8]]
    made = [recalled(seen, parts, of) for parts in prompts]
    tables = np.arange(3 * 2, dtype=np.int32).reshape(3, 2)

    def step(which: list[int]) -> Floats:
        count = len(which)
        return (
            of[0]
            .step(
                Batch(
                    tokens=np.concatenate([made[i][0] for i in which]).astype(np.int32),
                    positions=np.tile(np.arange(size, dtype=np.int32), count),
                    bounds=np.arange(count + 1, dtype=np.int32) * size,
                    block_tables=tables[which],
                    outputs=np.arange(count * size, dtype=np.int32),
                    memories=tuple(made[i][1] for i in which),
                    seen=np.concatenate([made[i][2] for i in which], axis=1),
                )
            )
            .copy()
        )

    alone = np.concatenate([step([i]) for i in range(3)])
    assert np.array_equal(step([0, 1, 2]), alone)
    assert np.array_equal(step([2, 0]), np.concatenate([alone[12:], alone[:6]]))


def test_every_field_of_the_tower_matters(seen: Seen) -> None:
    assert not unmoved(seen, draw("noise", 90, 30))


# Nothing is near or far in a memory, and its scores are as they are.
WITHOUT_EFFECT = re.compile(r"layers\[1\]\.attention\.(window|softcap)=present")


def test_every_field_of_the_decoder_matters(seen: Seen) -> None:
    if seen.case.name != "mllama":
        pytest.skip("of one decoder")
    spec, parts = seen.recipe.decoder, [1, 5, WIDE, 6, 7, HIGH, 8]
    shapes, ids = roles(spec), prompt(parts)[0]
    _, wanted = logits(seen, parts, 64, 0)
    still = []
    for name, changed in mutations(spec, seen.case.context):
        if roles(changed) != shapes or is_equivalent(name, spec) or WITHOUT_EFFECT.match(name):
            continue
        try:
            _, found = logits(seen, parts, 64, 0, changed)
        except (ValueError, UnsupportedModel):  # not one rope factor a frequency
            continue
        if distance(found, wanted) <= MOVED:
            still.append(name)
    assert len(ids) == len(wanted)
    assert not still


def test_what_tokens_see() -> None:
    """Against the mask of transformers, for all ways in which three images can stand."""
    sizes = [(20, 20), (40, 0), (10, 30)]
    images = [Processed({}, "", 0, recalled=size) for size in sizes]
    ends = np.cumsum([0, *(size // ROWS for size, _ in sizes)])
    for places in combinations(range(7), 3):
        ids = [IMAGE if at in places else 5 for at in range(7)]
        mask = mllama_oracle.mask(ids, IMAGE, [2, 4, 1])
        for begin, end, told, wanted in zip(*sight.seen(ids, IMAGE, images), mask, strict=True):
            found = np.zeros((3, 4), int)
            for image, (first, last) in enumerate(pairwise(ends)):
                if told and begin // ROWS <= first and last <= end // ROWS:
                    found[image, : last - first] = 1
            assert np.array_equal(found, wanted), (places, begin, end)
            assert told or (begin, end) == (0, 120)


def test_images_come_in_front_of_what_fills_them_up() -> None:
    made = [
        (Processed({}, "", 0, recalled=(2, 1)), np.full((3, 1), 1, np.float32)),
        (Processed({}, "", 0, recalled=(1, 2)), np.full((3, 1), 2, np.float32)),
    ]
    assert sight.ordered(made)[:, 0].tolist() == [1, 1, 2, 1, 2, 2]


def test_long_memories_are_made_in_parts(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [1, 5, WIDE, HIGH, 8]
    _, wanted = logits(seen, parts, 64, 2)
    monkeypatch.setattr(sight, "MOST_AT_ONCE", 7)
    assert np.array_equal(logits(seen, parts, 64, 2)[1], wanted)


def test_uqff_has_the_text_layers(seen: Seen, tmp_path: Path) -> None:
    """In mistral.rs's order: no head, and nothing of the layers that recall."""
    recipe, layers = seen.recipe, seen.recipe.decoder.layers
    names = [linear.roles for linear in linears(MODEL, recipe.decoder, recipe.naming)]
    own = [i for i, layer in enumerate(layers) if not layer.attention.recalls]
    stems = [f"attention.{part}" for part in ("q", "k", "v", "out")]
    stems += [f"feed_forward.{part}" for part in ("gate", "up", "down")]
    assert names == [(f"layers.{i}.{stem}",) for i in own for stem in stems]
    convert.write(seen.checkpoint, recipe, Plan.of("q8_0"), tmp_path / "tiny.uqff")
    again = open_checkpoint(tmp_path / "tiny.uqff")
    made = replace(seen, checkpoint=again, recipe=load(again))
    assert np.array_equal(made.rows(WIDE), seen.rows(WIDE))
    parts = [1, 5, WIDE, 6, 7]
    wanted = logits(seen, parts, 64, 0)[1]
    assert distance(logits(made, parts, 64, 0)[1], wanted) < 0.1


def test_adapters_of_keys(seen: Seen) -> None:
    """A mixture may change what is remembered."""
    at = next(i for i, layer in enumerate(seen.recipe.decoder.layers) if layer.attention.recalls)
    program = adaptable(decoder.compile_memory(seen.recipe.decoder, seen.recipe.names))
    limits = Limits(rows=dict.fromkeys(program.spaces, sight.MOST_AT_ONCE))
    keys = executors.open(program, seen.store, limits, pool=executors.thread_pool(1))
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (2, 128)), rng.normal(0, 1, (64, 2))
    stored = [Stored("f32", np.float32(part).reshape(-1).view(np.uint8), None) for part in (a, b)]
    adapter = keys.adapter({(f"layers.{at}.recall.v", 0): Term(*stored, 2)})
    rows = np.float32(rng.normal(0, 1, (5, 128)))

    class Kept:
        def memory(self, rows: int) -> Kept:
            self.values = np.empty((rows, 64), np.float32)
            return self

        def write(self, first: int, _: Sequence[Floats], values: Sequence[Floats]) -> None:
            self.values[first : first + len(values[0])] = values[0]

    plain, changed = Kept(), Kept()
    sight.remember(keys, cast(Executor, plain), rows)
    sight.remember(keys, cast(Executor, changed), rows, ((adapter, 0.5),))
    assert distance(changed.values - plain.values, np.float32(0.5 * rows @ a.T @ b.T)) < CLOSE


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": {"height": 42, "width": 43}}, "must be a tile's, 42"),
        ({"size": {"height": 28, "width": 28}}, "must be a tile's, 42"),
        ({"size": {"height": "42", "width": 42}}, "an integer"),
        ({"max_image_tiles": 5}, r"in 1\.\.4"),
        ({"max_image_tiles": 0}, r"in 1\.\.4"),
        ({"do_resize": False}, "do_resize"),
    ],
)
def test_processors_that_do_not_fit(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=text):
        Mllama.of(config(), PROCESSOR | change)


@pytest.mark.parametrize("gate", [None, [0.1, 0.2], [float("nan")]], ids=str)
def test_gates_that_are_none(gate: list[float] | None, tmp_path: Path) -> None:
    build(CASES[0], tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "vision_model.pre_tile_positional_embedding.gate"
    del tensors[name]
    save_file(tensors | ({} if gate is None else {name: torch.tensor(gate)}), file)
    with pytest.raises(InvalidCheckpoint, match=r"gate.*with one number"):
        load(open_folder(tmp_path))


def test_a_longest_edge() -> None:
    small = Mllama.of(config(), PROCESSOR | {"max_edge": 40})
    assert small.process(draw("noise", 200, 90)).recalled == (ROWS, 3 * ROWS)
    assert Mllama.of(config(), PROCESSOR).process(draw("noise", 200, 90)).recalled != (
        ROWS,
        3 * ROWS,
    )


def test_published_configurations(tmp_path: Path) -> None:
    """As on the hub: rope in keys of its own, and what the classes of 4.45 had besides."""
    seen = build(CASES[0], tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    rope = found["text_config"].pop("rope_parameters")
    found["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    usual = {
        "_name_or_path": "",
        "add_cross_attention": False,
        "top_k": 50,
        "torch_dtype": "bfloat16",
    }
    for part in ("text_config", "vision_config"):
        found[part] |= usual | {"architectures": None, "output_hidden_states": False}
    found["vision_config"] |= {"attention_heads": 4, "return_dict": True}
    del found["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(found))
    again = load(open_folder(tmp_path))
    assert [part.spec for part in again.parts] == [part.spec for part in seen.recipe.parts]
