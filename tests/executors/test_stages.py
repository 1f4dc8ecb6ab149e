"""Layers on several devices: what comes out is what one device gives, wherever the cuts are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import draw
from tiny_models import write_adapter, write_folder, write_xlora
from tiny_seers import write_seer

from squall import Model, executors
from squall.adapters.anymoe import AnyMoe, FineTuned
from squall.adapters.edits import adaptable
from squall.adapters.xlora import XLora
from squall.checkpoints import open_checkpoint
from squall.decoder import compile
from squall.errors import InvalidRequest
from squall.executors import Limits, Placement
from squall.executors.devices import stages_of
from squall.executors.staged import StagedExecutor
from squall.quant import Plan
from squall.recipes import load
from squall.weights import Term, WeightStore

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = 6
IDS = np.random.default_rng(4).integers(2, 258, 70).tolist()
GIVEN: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 2}
FLOATS: dict[str, Any] = {"weights": "f32", "kv_dtype": "f32", "context": 512, "threads": 1}
NATIVE = [f"cpu={cut};cpu" for cut in range(1, LAYERS)] + [
    "cpu=1;cpu=3;cpu",
    f"cpu={LAYERS - 1};cpu=9;cpu",
]
MIXED = [
    f"{a}={cut};{b}" for cut in range(1, LAYERS) for a, b in (("cpu", "torch"), ("torch", "cpu"))
]
MIXED += ["torch=1;cpu=2;torch", "cpu=2;torch=2;cpu", "torch=2;torch=2;torch"]
SOME = ["cpu=1;cpu", "torch=1;cpu", "cpu=1;torch"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of six layers, whose weights are large enough to matter."""
    folder = tmp_path_factory.mktemp("llama")
    return write_folder(folder, num_hidden_layers=LAYERS, initializer_range=0.2)


@pytest.fixture(scope="module")
def whole(llama: Path) -> Iterator[Model]:
    with Model.open(llama, **FLOATS) as model:
        yield model


def check(found: Model, wanted: Model, act: Callable[[Model], Any], device: str) -> None:
    """What `act` gives is the same, to the byte if all is native."""
    assert isinstance(found.executor.placement, Placement)
    one, other = act(found), act(wanted)
    if "torch" not in device:
        np.testing.assert_array_equal(one, other)
    else:
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


def tokens(model: Model, prompt: Any, **options: Any) -> list[int]:
    answer = model.generate(prompt, **GIVEN | options)
    answer.read()
    return answer.ids


@pytest.mark.parametrize("device", [*NATIVE, *MIXED])
def test_every_split_gives_what_one_device_gives(llama: Path, whole: Model, device: str) -> None:
    with Model.open(llama, device=device, **FLOATS) as model:
        assert isinstance(model.executor, StagedExecutor)
        check(model, whole, lambda m: m.logits(IDS), device)
        check(model, whole, lambda m: m.logits(IDS, chunk=7), device)
        assert tokens(model, IDS) == tokens(whole, IDS)
        executor, one = model.executor, whole.executor
        assert executor.kv_bytes == one.kv_bytes
        if "torch" not in device:
            assert (executor.weight_bytes, executor.formats) == (one.weight_bytes, one.formats)
        for name in ("vocab", "ids", "context", "max_rows", "max_outputs", "blocks", "whole"):
            assert getattr(executor, name) == getattr(one, name), name


@pytest.mark.parametrize("device", SOME)
def test_tied_weights_adapters_and_guesses(tmp_path: Path, device: str) -> None:
    folder = write_folder(
        tmp_path / "base", tie_word_embeddings=True, num_hidden_layers=3, initializer_range=0.2
    )
    modules = ["q_proj", "v_proj", "up_proj", "embed_tokens"]
    adapters = {
        name: write_adapter(tmp_path / name, folder, seed, target_modules=modules)
        for seed, name in enumerate("ab")
    }
    opened = [Model.open(folder, adapters=adapters, device=d, **FLOATS) for d in (device, "cpu")]
    split, one = opened
    for chosen in ("a", {"a": 0.5, "b": -0.7}, []):
        check(split, one, lambda m, chosen=chosen: m.logits(IDS, adapters=chosen), device)
    assert not np.array_equal(split.logits(IDS, adapters="a"), split.logits(IDS))
    assert tokens(split, IDS, adapters="b") == tokens(one, IDS, adapters="b")
    split.re_isq("Q8_0")  # exact weights stay what they are, and adapters fit
    check(split, one, lambda m: m.logits(IDS, adapters="a"), device)
    for draft in ("ngram", folder):
        with Model.open(folder, draft=draft, device=device, **FLOATS) as guessing:
            assert tokens(guessing, IDS[:9] * 5, max_tokens=30) == tokens(
                one, IDS[:9] * 5, max_tokens=30, adapters=[]
            )
            assert guessing.engine.stats().counts.guessed_tokens > 0
    for model in opened:
        model.close()


@pytest.mark.parametrize("device", SOME)
@pytest.mark.parametrize("name", ["vllama", "llava"])
def test_images(tmp_path: Path, name: str, device: str) -> None:
    """Rows of images, and memories that layers of one stage or the other recall."""
    folder, given = write_seer(tmp_path, name), {"adapters": None} | FLOATS
    parts = [
        {"type": "image", "image": draw("gradient", 99, 20)},
        {"type": "text", "text": "What is this?"},
        {"type": "image", "image": draw("text", 40, 90)},
    ]
    messages = [{"role": "user", "content": parts}]
    splits = [device, device.replace("=1", "=2")] if name == "vllama" else [device]
    with Model.open(folder, **given) as one:
        wanted = tokens(one, messages)
        for split in splits:
            with Model.open(folder, device=split, **given) as model:
                assert tokens(model, messages) == wanted
                assert tokens(model, "no image") == tokens(one, "no image")
                sight = model.sight
                assert sight is not None
                assert len(sight._tower.placement.stages) == 1


@pytest.mark.parametrize("device", SOME)
def test_x_lora_and_anymoe(tmp_path: Path, device: str) -> None:
    base = write_folder(tmp_path / "base", num_hidden_layers=3, initializer_range=0.2)
    write_xlora(tmp_path / "mixed", base, ["0", "1"], "base", layerwise_scalings=False)
    xlora = XLora(tmp_path / "mixed")
    with (
        Model.open(base, xlora=xlora, device=device, **FLOATS) as split,
        Model.open(base, xlora=xlora, **FLOATS) as one,
        Model.open(base, **FLOATS) as plain,
    ):
        check(split, one, lambda m: m.logits(IDS), device)
        assert tokens(split, IDS) == tokens(one, IDS)
        assert not np.array_equal(one.logits(IDS), plain.logits(IDS))
    other = write_folder(tmp_path / "other", num_hidden_layers=3, initializer_range=0.3)
    rows = [{"prompt": "aab", "expert": 0}, {"prompt": "121", "expert": 1}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    experts = AnyMoe(
        hidden_size=64, dataset_json=str(tmp_path / "rows.json"), prefix="model.layers",
        mlp="mlp", model_ids=(str(other),), expert_type=FineTuned(), layers=(0, 2), epochs=2,
        batch_size=2, lr=0.01,
    )  # fmt: skip
    opened = [Model.open(base, anymoe=experts, device=d, **FLOATS) for d in (device, "cpu")]
    check(*opened, lambda m: m.logits(IDS), device)
    for model in opened:
        model.close()


def opened(folder: Path, device: str, **given: Any) -> Any:
    checkpoint = open_checkpoint(folder)
    recipe = load(checkpoint)
    program = adaptable(compile(recipe.decoder, recipe.names, context=128))
    limits = Limits(blocks=8)
    placement = Placement(stages_of(device))
    return executors.open(
        program, WeightStore(checkpoint), limits, placement=placement,
        pool=executors.thread_pool(1), **given,
    )  # fmt: skip


def test_progress_profile_and_kept_values(llama: Path) -> None:
    told: list[tuple[int, int]] = []
    keep = ("layers.0", "layers.3", "norm")
    executor = opened(llama, "cpu=2;cpu", keep=keep, progress=lambda *at: told.append(at))
    one = opened(llama, "cpu", keep=keep)
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    step = batch()

    def named(of: Any) -> list[str]:
        """Where time goes, in order, but for rows that are made ready for a stage."""
        return [phase.name for phase in of.profile(lambda: of.step(step)) if phase.name != "input"]

    assert named(executor) == named(one)
    np.testing.assert_array_equal(executor.step(step), one.step(step))
    for name in keep:
        np.testing.assert_array_equal(executor.value(name), one.value(name))
    with pytest.raises(InvalidRequest, match="no value named nothing"):
        opened(llama, "cpu=2;cpu", keep=("nothing",))
    with pytest.raises(InvalidRequest, match="no weight nothing"):
        executor.adapter({("nothing", 0): Term(None, None, 4)})
    assert executor.isa.count(" layers on ") == 2
    # What was made for another model is refused.
    with pytest.raises(InvalidRequest):
        executor.run(step.inputs(executor.program.indices), step, [((one.adapter({}), 1.0),)])


def batch() -> Any:
    from squall.batch import Batch

    rows = np.arange(20, dtype=np.int32)
    return Batch(
        tokens=rows + 40, positions=rows, bounds=np.array([0, 20], np.int32),
        block_tables=np.arange(8, dtype=np.int32)[None], outputs=rows[-3:],
    )  # fmt: skip


def test_weights_change_in_all_stages_or_in_none(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, step = opened(llama, "cpu=2;cpu"), batch()
    before = executor.step(step)
    plan, real, calls = Plan.of("q8_0"), executors.open, []

    def failing(*given: Any, **options: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError
        return real(*given, **options)

    monkeypatch.setattr(executors, "open", failing)
    with pytest.raises(MemoryError):
        executor.requantize(plan)
    assert executor.plan == Plan()
    np.testing.assert_array_equal(executor.step(step), before)
    monkeypatch.undo()
    executor.requantize(plan)
    assert {total.format for total in executor.formats} >= {"q8_0"}
    fresh = opened(llama, "cpu")
    fresh.requantize(plan)
    np.testing.assert_array_equal(executor.step(step), fresh.step(step))
