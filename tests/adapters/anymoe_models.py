"""AnyMoE in torch: the models of transformers with experts, gates, and the training of these."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from squall import recipes
from squall.adapters.anymoe import AnyMoe, Experts, FineTuned, gate_names
from squall.adapters.anymoe_training import open_experts
from squall.checkpoints import open_checkpoint
from squall.executors import Executor, Limits
from squall.weights import WeightStore

EXPERTS, RANK, ALPHA = 3, 4, 10.0
# Each expert's prompts have letters of their own, so that gates learn fast.
TEXTS = [
    ("abba babbaab aab", 0), ("bab abab", 0), ("aaaabbbb ba", 0),
    ("1 + 12 = 112", 1), ("21 * 2 + 11", 1), ("2 + 1221", 1),
    ("xyz.zyx(z)", 2), ("zz(xy, yx).x", 2), ("y.z(x)", 2),
]  # fmt: skip
EPOCHS, BATCH, LR = 12, 4, 0.02
ROWS = 64
BY_NAME = {case.name: case for case in tiny.CASES}


class Mixture(torch.nn.Module):
    """The first `prompt` tokens of a text have one expert together, the others their own."""

    def __init__(self, experts: Sequence[torch.nn.Module], gate: NDArray[np.float64]) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(experts)
        self.gate = torch.nn.Linear(gate.shape[1] - 1, gate.shape[0])
        with torch.no_grad():
            self.gate.weight.copy_(torch.tensor(gate[:, :-1]))
            self.gate.bias.copy_(torch.tensor(gate[:, -1]))
        self.prompt = 0
        self.mean = torch.empty(0)
        self.chosen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.softmax(self.gate(x.detach())[0], dim=-1)
        prompt = self.prompt or len(scores)
        self.mean = scores[:prompt].mean(dim=0)
        best = int(self.mean.argmax())
        self.chosen = [best] * prompt + scores[prompt:].argmax(dim=-1).tolist()
        return torch.stack([self.experts[e](x[:, i]) for i, e in enumerate(self.chosen)], dim=1)


def build(case: tiny.Case, folder: Path) -> tuple[Any, list[Path]]:
    """A model, in a folder too, and those that its experts are of."""
    models = [tiny.build(replace(case, name=f"{case.name}{i}")) for i in range(EXPERTS)]
    paths = [folder / f"{case.name}{i}" for i in range(EXPERTS)]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path, max_shard_size="150KB")
    return models, paths


def with_experts(
    model: Any, experts: Sequence[Any], gates: NDArray[np.float64], layers: Sequence[int]
) -> list[Mixture]:
    """Puts the feed-forwards of other models beside the model's own."""
    found = []
    for layer, gate in zip(layers, gates, strict=True):
        mlps = [of.model.layers[layer].mlp for of in (model, *experts)]
        found.append(Mixture(mlps, gate))
        model.model.layers[layer].mlp = found[-1]
    return found


def adapted(model: Any, modules: Sequence[str], path: Path, prefix: str, seed: int) -> Any:
    """A copy of the model with an adapter merged into its feed-forwards; the adapter is saved."""
    generator, found, tensors = torch.Generator().manual_seed(seed), copy.deepcopy(model), {}
    for i, layer in enumerate(found.model.layers):
        for module in modules:
            weight = getattr(layer.mlp, module).weight
            a = torch.randn(RANK, weight.shape[1], generator=generator) * 0.15
            b = torch.randn(weight.shape[0], RANK, generator=generator) * 0.15
            weight.data += (b @ a) * (ALPHA / RANK)
            name = f"{prefix}model.layers.{i}.mlp.{module}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    return found


def train(
    model: Any,
    mixtures: Sequence[Mixture],
    batches: Sequence[Sequence[tuple[list[int], int]]],
    lr: float,
) -> list[list[float]]:
    """The losses of each step, a layer each."""
    optimizers = [torch.optim.AdamW(m.gate.parameters(), lr=lr, weight_decay=0.0) for m in mixtures]
    losses = []
    for batch in batches:
        means = []
        for ids, _ in batch:
            model(torch.tensor([ids]))
            means.append([m.mean for m in mixtures])
        labels = torch.tensor([expert for _, expert in batch])
        row = []
        for i, optimizer in enumerate(optimizers):
            loss = torch.nn.functional.cross_entropy(torch.stack([m[i] for m in means]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            row.append(float(loss.detach()))
        losses.append(row)
    return losses


def encode(prompt: str) -> list[int]:
    return [1, *(3 + ord(c) for c in prompt)]


EXAMPLES = [(encode(text), expert) for text, expert in TEXTS]


@dataclass
class Tiny:
    """A model with experts, in torch and as files."""

    case: tiny.Case
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

    def open(self, config: AnyMoe, rows: int = ROWS, blocks: int = 16, **options: Any) -> Executor:
        checkpoint = open_checkpoint(self.paths[0])
        experts = Experts(config, checkpoint, recipes.load(checkpoint))
        store = WeightStore(checkpoint, others=experts.others, merged=experts.merged)
        limits = Limits(rows={"tokens": rows, "outputs": rows}, blocks=blocks, kv_dtype="f32")
        return open_experts(experts, store, limits, context=ROWS, encode=encode, **options)

    def random_gates(self) -> AnyMoe:
        """Gates that differ much from token to token."""
        generator, tensors = torch.Generator().manual_seed(1), {}
        hidden, folder = self.model.config.hidden_size, self.folder / "random"
        for layer in range(len(self.model.model.layers)):
            weight, bias = gate_names(layer)
            tensors[weight] = torch.randn(EXPERTS, hidden, generator=generator)
            tensors[bias] = torch.randn(EXPERTS, generator=generator)
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "gate.safetensors")
        return self.config(training=False, gate_model_id=str(folder))


def made(name: str, folder: Path) -> Tiny:
    case = BY_NAME[name]
    models, paths = build(case, folder)
    return Tiny(case, models[0], models[1:], paths, folder)
