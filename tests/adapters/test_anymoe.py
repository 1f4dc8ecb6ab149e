"""AnyMoE against torch: losses step by step, the experts chosen, logits, and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anymoe_torch as reference
import numpy as np
import pytest
import torch
from anymoe_torch import EXPERTS
from harness import make_batch
from numpy.typing import NDArray
from tiny import CASES, Case

from squall import recipes
from squall.adapters.anymoe import AnyMoe, Experts, FineTuned
from squall.adapters.anymoe_training import beginning, open_experts
from squall.batch import Batch
from squall.checkpoints import open_checkpoint
from squall.executors import Executor, Limits
from squall.weights import WeightStore

# Each expert's prompts have letters of their own, so that gates learn fast.
TEXTS = [
    ("abba babbaab aab", 0), ("bab abab", 0), ("aaaabbbb ba", 0),
    ("1 + 12 = 112", 1), ("21 * 2 + 11", 1), ("2 + 1221", 1),
    ("xyz.zyx(z)", 2), ("zz(xy, yx).x", 2), ("y.z(x)", 2),
]  # fmt: skip
EPOCHS, BATCH, LR = 12, 4, 0.02
BY_NAME = {case.name: case for case in CASES}
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
ROWS = 64

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def encode(prompt: str) -> list[int]:
    return [1, *(3 + ord(c) for c in prompt)]


EXAMPLES = [(encode(text), expert) for text, expert in TEXTS]


@dataclass
class Tiny:
    """A model with experts, in torch and as files."""

    case: Case
    model: Any
    experts: Sequence[Any]
    paths: Sequence[Path]
    folder: Path

    def config(self, **changes: Any) -> AnyMoe:
        rows = [{"prompt": text, "expert": expert} for text, expert in TEXTS]
        dataset = self.folder / "rows.json"
        dataset.write_text(json.dumps({"rows": rows}))
        hidden = self.model.config.hidden_size
        given: dict[str, Any] = {
            "prefix": "model.layers", "mlp": "mlp", "model_ids": [str(p) for p in self.paths[1:]],
            "expert_type": FineTuned(), "lr": LR, "epochs": EPOCHS, "batch_size": BATCH,
            "gate_model_id": str(self.folder / "gates"),
            "loss_csv_path": str(self.folder / "losses" / "losses.csv"),
        }  # fmt: skip
        return AnyMoe(hidden, str(dataset), **(given | changes))

    def open(self, config: AnyMoe, **options: Any) -> Executor:
        checkpoint = open_checkpoint(self.paths[0])
        experts = Experts(config, recipes.load(checkpoint))
        store = WeightStore(checkpoint, others=experts.others, merged=experts.merged)
        limits = Limits(rows={"tokens": ROWS, "outputs": ROWS}, blocks=16, kv_dtype="f32")
        return open_experts(experts, store, limits, context=ROWS, encode=encode, **options)


def made(name: str, folder: Path) -> Tiny:
    case = BY_NAME[name]
    models, paths = reference.build(case, folder)
    return Tiny(case, models[0], models[1:], paths, folder)


def batches() -> list[list[tuple[list[int], int]]]:
    random, found = np.random.default_rng(0), []
    for _ in range(EPOCHS):
        order = random.permutation(len(EXAMPLES))
        found += [
            [EXAMPLES[i] for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)
        ]
    return found


def in_torch(
    tiny: Tiny, layers: Sequence[int]
) -> tuple[list[reference.Mixture], list[list[float]]]:
    gates = beginning(len(layers), EXPERTS, tiny.model.config.hidden_size)
    mixtures = reference.with_experts(tiny.model, tiny.experts, gates, layers)
    return mixtures, reference.train(tiny.model, mixtures, batches(), LR)


def losses_of(config: AnyMoe) -> tuple[list[str], NDArray[np.float64]]:
    header, *rows = Path(str(config.loss_csv_path)).read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows] == list(range(len(rows)))
    return header.split(","), np.array([[float(x) for x in row.split(",")[1:]] for row in rows])


def with_prompt(batch: Batch, *prompts: int) -> Batch:
    return replace(batch, prompts=np.array(prompts, np.int32))


def check_like_torch(tiny: Tiny, executor: Executor, mixtures: Sequence[reference.Mixture]) -> None:
    """Every prompt with its expert; then tokens of an answer with their own."""
    for ids, expert in EXAMPLES:
        answer = ids[::-1][:7]
        for mixture in mixtures:
            mixture.prompt = len(ids)
        with torch.no_grad():
            wanted = tiny.model(torch.tensor([ids + answer])).logits[0].numpy()
        assert all(mixture.chosen[0] == expert for mixture in mixtures)
        found = executor.step(with_prompt(make_batch([(ids, 0, 0)]), len(ids)))
        more = executor.step(with_prompt(make_batch([(answer, len(ids), 0)]), len(ids)))
        got = np.concatenate([found, more])
        assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


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
