"""AnyMoE against torch: losses step by step, the experts chosen, logits, and files."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import anymoe_models as models
import numpy as np
import pytest
import torch
from anymoe_models import (
    ALPHA,
    BATCH,
    EPOCHS,
    EXAMPLES,
    EXPERTS,
    LR,
    RANK,
    ROWS,
    Mixture,
    Tiny,
    made,
)
from convert import convert
from harness import distance, make_batch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from squall import recipes
from squall.adapters.anymoe import AnyMoe, FineTuned, LoraAdapter
from squall.adapters.anymoe_training import beginning, write_losses
from squall.batch import Batch
from squall.checkpoints import open_checkpoint
from squall.checkpoints.safetensors import open_part
from squall.convert import write
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound
from squall.executors import Executor
from squall.quant import Plan

NAMES = [
    "llama-biased-tied",
    "mistral",
    "gemma",
    "gemma2",
    "phi2",
    "phi3",
    "qwen2",
    "starcoder2",
    "granite",
    "olmo2",
]


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def batches() -> list[list[tuple[list[int], int]]]:
    random, found = np.random.default_rng(0), []
    for _ in range(EPOCHS):
        order = random.permutation(len(EXAMPLES))
        found += [
            [EXAMPLES[i] for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)
        ]
    return found


def in_torch(tiny: Tiny, layers: Sequence[int]) -> tuple[list[Mixture], list[list[float]]]:
    gates = beginning(len(layers), EXPERTS, tiny.model.config.hidden_size)
    mixtures = models.with_experts(tiny.model, tiny.experts, gates, layers)
    return mixtures, models.train(tiny.model, mixtures, batches(), LR)


def losses_of(config: AnyMoe) -> tuple[list[str], NDArray[np.float64]]:
    header, *rows = Path(str(config.loss_csv_path)).read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows] == list(range(len(rows)))
    return header.split(","), np.array([[float(x) for x in row.split(",")[1:]] for row in rows])


def with_prompt(batch: Batch, *prompts: int) -> Batch:
    return replace(batch, prompts=np.array(prompts, np.int32))


def check_like_torch(
    tiny: Tiny,
    executor: Executor,
    mixtures: Sequence[Mixture],
    answers: int = 7,
    near: float = 1e-4,
) -> None:
    """Every prompt with its expert; then tokens of an answer with their own."""
    for ids, expert in EXAMPLES:
        answer = ids[::-1][:answers]
        for mixture in mixtures:
            mixture.prompt = len(ids)
        with torch.no_grad():
            wanted = tiny.model(torch.tensor([ids + answer])).logits[0].numpy()
        assert all(mixture.chosen[0] == expert for mixture in mixtures)
        got = executor.step(with_prompt(make_batch([(ids, 0, 0)]), len(ids)))
        if answers:
            more = executor.step(with_prompt(make_batch([(answer, len(ids), 0)]), len(ids)))
            got = np.concatenate([got, more])
        assert distance(got, wanted) < near


@pytest.mark.parametrize("name", NAMES)
def test_fine_tuned_experts_are_trained_and_chosen_like_in_torch(name: str, tmp_path: Path) -> None:
    tiny = made(name, tmp_path)
    layers = range(len(tiny.model.model.layers))
    config = tiny.config()
    steps: list[tuple[int, int]] = []
    executor = tiny.open(config, trained=lambda done, whole: steps.append((done, whole)))
    mixtures, losses = in_torch(tiny, layers)
    header, found = losses_of(config)
    assert header == ["Step", *(f"Gating layer {i}" for i in layers)]
    np.testing.assert_allclose(found, losses, atol=1e-4)
    assert steps == [(i + 1, len(losses)) for i in range(len(losses))]
    check_like_torch(tiny, executor, mixtures)


@pytest.mark.parametrize(
    ("name", "modules", "prefix"),
    [
        ("llama", ["gate_proj", "down_proj"], "base_model.model."),
        ("phi3", ["gate_up_proj"], ""),
        ("starcoder2", ["c_fc", "c_proj"], ""),
    ],
)
def test_experts_of_lora_adapters_are_like_in_torch(
    name: str, modules: list[str], prefix: str, tmp_path: Path
) -> None:
    tiny = made(name, tmp_path)
    tiny.paths = [tiny.paths[0], *(tmp_path / f"adapter{i}" for i in range(1, EXPERTS))]
    tiny.experts = [
        models.adapted(tiny.model, modules, path, prefix, seed)
        for seed, path in enumerate(tiny.paths[1:])
    ]
    config = tiny.config(expert_type=LoraAdapter(RANK, ALPHA, modules))
    executor = tiny.open(config)
    mixtures, losses = in_torch(tiny, range(len(tiny.model.model.layers)))
    np.testing.assert_allclose(losses_of(config)[1], losses, atol=1e-4)
    check_like_torch(tiny, executor, mixtures)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return made("llama", tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("layers", [[0], [3], [2, 1]])
def test_chosen_layers_alone_have_experts(small: Tiny, layers: list[int], tmp_path: Path) -> None:
    tiny = replace(small, model=copy.deepcopy(small.model), folder=tmp_path)
    config = tiny.config(layers=layers)
    executor = tiny.open(config)
    mixtures, losses = in_torch(tiny, sorted(layers))
    np.testing.assert_allclose(losses_of(config)[1], losses, atol=1e-4)
    check_like_torch(tiny, executor, mixtures)
    found = {tensor.name for tensor in open_part(tmp_path / "gates/gate.safetensors").tensors()}
    assert found == {f"moe_gate.{i}.{kind}" for i in layers for kind in ("weight", "bias")}


def logits(executor: Executor) -> list[bytes]:
    return [
        executor.step(with_prompt(make_batch([(ids, 0, 0)]), len(ids))).tobytes()
        for ids, _ in EXAMPLES
    ]


@pytest.mark.parametrize("format", ["F32", "F16", "BF16"])
def test_saved_gates_answer_the_same(small: Tiny, format: str, tmp_path: Path) -> None:
    tiny = replace(small, folder=tmp_path)
    config = tiny.config(epochs=3)
    trained, again = tiny.open(config), tiny.open(config)
    reloaded = tiny.open(replace(config, training=False, dataset_json="none.json"))
    assert logits(trained) == logits(again) == logits(reloaded)
    file = tmp_path / "gates" / "gate.safetensors"
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[format]
    rounded = {name: tensor.to(kind) for name, tensor in load_file(file).items()}
    save_file(rounded, tmp_path / "gates" / "model.safetensors")
    file.unlink()
    from_rounded = tiny.open(replace(config, training=False))
    save_file({n: t.float() for n, t in rounded.items()}, file)
    file.with_name("model.safetensors").unlink()
    assert logits(from_rounded) == logits(tiny.open(replace(config, training=False)))


def test_float_experts_beside_a_quantized_model(small: Tiny, tmp_path: Path) -> None:
    floats, file = tmp_path / "floats.gguf", tmp_path / "base.gguf"
    convert(small.model, "llama", floats)
    own = open_checkpoint(floats)
    write(own, recipes.load(own), Plan.of("Q8_0"), file, threads=1)
    tiny = replace(small, model=copy.deepcopy(small.model), folder=tmp_path)
    tiny.paths = [file, *small.paths[1:]]
    executor = tiny.open(tiny.config())
    assert {total.format for total in executor.formats} == {"q8_0", "f32"}
    mixtures, _ = in_torch(tiny, range(4))
    check_like_torch(tiny, executor, mixtures, answers=0, near=0.1)
    models.adapted(small.model, ["up_proj"], tmp_path / "adapter", "", 0)
    tiny.paths = [file, *[tmp_path / "adapter"] * 2]
    with pytest.raises(InvalidRequest, match=r"experts\.up are quantized"):
        tiny.open(tiny.config(expert_type=LoraAdapter(RANK, ALPHA, ["up_proj"])))


def test_other_names_in_the_checkpoints_of_experts(small: Tiny, tmp_path: Path) -> None:
    tiny = replace(small, folder=tmp_path)
    wanted = logits(tiny.open(tiny.config(epochs=2)))
    paths = [tmp_path / path.name for path in small.paths]
    for path, source in zip(paths[1:], small.paths[1:], strict=True):
        path.mkdir()
        tensors = {
            name.replace("model.layers.", "net.blocks.").replace(".mlp.", ".ff.inner."): tensor
            for part in source.glob("*.safetensors")
            for name, tensor in load_file(part).items()
            if ".mlp." in name
        }
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text((source / "config.json").read_text())
    names = {"prefix": "net.blocks", "mlp": "ff.inner", "model_ids": [str(p) for p in paths[1:]]}
    assert logits(tiny.open(tiny.config(epochs=2, **names))) == wanted


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model_ids": []}, InvalidRequest, "model_ids is .* at least 1"),
    ({"model_ids": "one"}, InvalidRequest, "model_ids is 'one'"),
    ({"lr": 0}, InvalidRequest, "lr is 0: .* greater than 0"),
    ({"lr": float("nan")}, InvalidRequest, "lr is nan"),
    ({"epochs": 0}, InvalidRequest, "epochs is 0"),
    ({"epochs": 1.5}, InvalidRequest, "epochs is 1.5: .* integer"),
    ({"batch_size": True}, InvalidRequest, "batch_size is True"),
    ({"prefix": 3}, InvalidRequest, "prefix is 3: .* string"),
    ({"training": "yes"}, InvalidRequest, "training is 'yes'"),
    ({"layers": ["1"]}, InvalidRequest, "layers is "),
    ({"expert_type": FineTuned}, InvalidRequest, "expert_type is "),
    ({"loss_csv_path": "losses.txt"}, InvalidRequest, r"losses\.txt.*csv"),
    ({"training": False, "gate_model_id": None}, InvalidRequest, "gate_model_id"),
    ({"layers": [4]}, InvalidRequest, "0 to 3"),
    ({"layers": [-1]}, InvalidRequest, "0 to 3"),
    ({"mlp": "ffn"}, InvalidCheckpoint, r"expert 1, model\.layers\.\*\.ffn of .*missing"),
    ({"model_ids": ["/nowhere"]}, ModelNotFound, "nowhere"),
    ({"training": False, "gate_model_id": "/nowhere"}, ModelNotFound, "0 safetensors"),
    ({"expert_type": LoraAdapter(4, 1.0, ["up_proj"])}, ModelNotFound, "adapter_model"),
]


@pytest.mark.parametrize(("changes", "error", "text"), REFUSED)
def test_what_cannot_be_is_refused(
    small: Tiny, changes: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    tiny = replace(small, folder=tmp_path)
    with pytest.raises(error, match=text):
        tiny.open(tiny.config(**changes))


@pytest.mark.parametrize(
    ("modules", "rank", "error", "text"),
    [
        (["q_proj"], RANK, InvalidCheckpoint, "expert 1.*mlp.q_proj has no weights of LoRA"),
        (["up_proj"], 5, InvalidCheckpoint, "mlp.up_proj has no weights of LoRA of rank 5"),
        (["up_proj", "down_proj"], RANK, InvalidCheckpoint, "mlp.down_proj has no weights"),
    ],
)
def test_adapters_that_are_refused(
    small: Tiny, modules: list[str], rank: int, error: type[Exception], text: str, tmp_path: Path
) -> None:
    models.adapted(small.model, ["up_proj"], tmp_path / "adapter", "", 0)
    tiny = replace(small, folder=tmp_path)
    tiny.paths = [small.paths[0], tmp_path / "adapter"]
    with pytest.raises(error, match=text):
        tiny.open(tiny.config(expert_type=LoraAdapter(rank, 1.0, modules)))


def test_another_hidden_size_is_refused(small: Tiny) -> None:
    with pytest.raises(InvalidRequest, match="hidden_size is 64, of the model 128"):
        small.open(replace(small.config(), hidden_size=64))


def test_a_missing_file_of_prompts_is_refused(small: Tiny) -> None:
    with pytest.raises(InvalidRequest, match="dataset_json /nowhere"):
        small.open(replace(small.config(), dataset_json="/nowhere"))


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "no file with"),
        ([{"prompt": "a"}], "row 0 .* must have a prompt"),
        ([{"prompt": "a", "expert": "1"}], "must have a prompt"),
        ([{"prompt": "a", "expert": True}], "must have a prompt"),
        (
            [{"prompt": "a", "expert": 0}, {"prompt": "a", "expert": 3}],
            "row 1 .* expert 3; .* 0 to 2",
        ),
        ([{"prompt": "a", "expert": -1}], "expert -1"),
        ([{"prompt": "a", "expert": 1, "image_urls": ["x.png"]}], "images"),
        ([{"prompt": "a" * ROWS, "expert": 1}], "65 tokens; 1 to 64"),
    ],
)
def test_rows_that_are_refused(small: Tiny, rows: list[Any], text: str, tmp_path: Path) -> None:
    dataset = tmp_path / "rows.json"
    dataset.write_text(json.dumps({"rows": rows}))
    with pytest.raises(InvalidRequest, match=text):
        small.open(replace(small.config(), dataset_json=str(dataset)))


def test_rows_may_say_that_there_are_no_images(small: Tiny, tmp_path: Path) -> None:
    tiny = replace(small, folder=tmp_path)
    config = tiny.config(epochs=2)
    rows = [{"prompt": "a", "expert": 1, "image_urls": None}]
    Path(config.dataset_json).write_text(json.dumps({"rows": rows}))
    tiny.open(config)
    assert len(losses_of(config)[1]) == 2


def test_losses_are_plotted_where_matplotlib_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure, module = MagicMock(), ModuleType("matplotlib.figure")
    module.Figure = lambda: figure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    write_losses(tmp_path / "losses.csv", [[1.0, 0.5], [0.25, 0.12345]])
    text = "Step,Gating layer 0,Gating layer 1\n0,1.0000,0.5000\n1,0.2500,0.1235\n"
    assert (tmp_path / "losses.csv").read_text() == text
    figure.savefig.assert_called_once_with(tmp_path / "losses.png")
