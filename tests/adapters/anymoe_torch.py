"""AnyMoE in torch: the models of transformers with experts, gates, and the training of these."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

EXPERTS = 3
RANK, ALPHA = 4, 10.0


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
