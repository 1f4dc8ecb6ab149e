"""AnyMoE: the feed-forward layers of other models as experts beside a model's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from squall import decoder
from squall.adapters.peft import tensors_of
from squall.checkpoints import Checkpoint, open_checkpoint
from squall.checkpoints.base import Tensor
from squall.checkpoints.hub import Hub, is_id
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, UnsupportedModel
from squall.program import (
    GatedLinear,
    Index,
    Linear,
    Matrix,
    MixtureOfExperts,
    Program,
    Site,
    Slice,
    Value,
    Vector,
)
from squall.recipes import Recipe
from squall.recipes.modules import namings
from squall.recipes.names import locate
from squall.roles import roles
from squall.spec import Mlp
from squall.weights import Stored, Term

SHARED = Index("shared")
GATES = "gates"  # their source in a weight store
MAX_EXPERTS = 256
_PARTS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class FineTuned:
    """Experts are whole feed-forward layers of other checkpoints."""


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """Experts are the model's own feed-forward layers, to which adapters were added."""

    rank: int
    alpha: float
    target_modules: Sequence[str]


@dataclass(frozen=True, slots=True)
class AnyMoe:
    """Which experts a model gets, and where the gates that choose among them come from.

    hidden_size: of the model. dataset_json: prompts, and which expert is for each.
    prefix, mlp: the experts' checkpoints have the feed-forward of layer 3 at `<prefix>.3.<mlp>`.
    model_ids: folders or models of the hub, an expert each, from 1 on; 0 is the model's own.
    layers: those that get experts; by default all.
    gate_model_id: the folder that gates are written to or, without `training`, read from.
    loss_csv_path: a .csv file for the losses of each step, with a plot beside it.
    """

    hidden_size: int
    dataset_json: str
    prefix: str
    mlp: str
    model_ids: Sequence[str]
    expert_type: FineTuned | LoraAdapter
    layers: Sequence[int] = ()
    lr: float = 1e-3
    epochs: int = 100
    batch_size: int = 4
    gate_model_id: str | None = None
    training: bool = True
    loss_csv_path: str | None = None

    def __post_init__(self) -> None:
        path = self.loss_csv_path
        for fine, problem in (
            (1 <= len(self.model_ids) < MAX_EXPERTS, f"of model_ids 1 to {MAX_EXPERTS - 1} may be"),
            (0 < self.lr < float("inf"), f"lr is {self.lr}; it must be above 0 and finite"),
            (min(self.epochs, self.batch_size) > 0, "epochs and batch_size must be at least 1"),
            (path is None or path.endswith(".csv"), f"loss_csv_path is {path!r}, not a .csv file"),
            (self.training or self.gate_model_id, "gate_model_id must say where the gates are"),
        ):
            if not fine:
                raise InvalidRequest(f"AnyMoE: {problem}")


class Experts:
    """The experts of a model; `others` and `merged` are for its weight store."""

    def __init__(self, config: AnyMoe, recipe: Recipe, hub: Hub | None = None) -> None:
        self.config, self.recipe, self._hub = config, recipe, hub or Hub()
        self.count, self.layers = len(config.model_ids) + 1, _layers(config, recipe)
        self._naming = replace(namings(recipe.architecture)[0], layer="model.layers.{}.")
        stems = {f"layers.{layer}.feed_forward.{part}" for layer in self.layers for part in _PARTS}
        shapes = roles(recipe.decoder)
        self._shapes = {role: shapes[role] for role in shapes if role.rpartition(".")[0] in stems}
        self._slices = {role: recipe.names[role] for role in self._shapes}
        self.others: dict[str, Checkpoint] = {}
        self.merged: dict[Site, tuple[Term, ...]] = {}
        for number, model in enumerate(config.model_ids, start=1):
            self._add(number, model)

    def program(self, context: int) -> Program:
        """The model's, with a mixture of experts in place of each layer's feed-forward."""
        spec, names = self.recipe.decoder, self.recipe.names
        own = decoder.compile(spec, names, context=context, whole=True)
        ups = {f"layers.{layer}.feed_forward.up" for layer in self.layers}
        upper = [
            op for op in own.ops if isinstance(op, Linear | GatedLinear) and op.out.name in ups
        ]
        inner = {op.out: op.x for op in upper}
        ops = [
            self._mixture(op, inner[op.x]) if isinstance(op, Linear) and op.x in inner else op
            for op in own.ops
            if op.out not in inner
        ]
        values = tuple(value for value in own.values if value not in inner)
        return replace(own, ops=tuple(ops), values=values)

    def gates(self) -> Checkpoint:
        """Those that are stored."""
        folder = self._path(str(self.config.gate_model_id))
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelNotFound(f"AnyMoE: {folder} has {len(files)} safetensors files, not 1")
        tensors = tensors_of(folder, files[0])
        for layer in self.layers:
            weight, bias = gate_names(layer)
            _tensor(tensors, weight, (self.count, self.config.hidden_size))
            _tensor(tensors, bias, (self.count,))
        return Checkpoint(folder, {}, tensors, files[0].stat().st_size)

    def _mixture(self, down: Linear, x: Value) -> MixtureOfExperts:
        block, count = down.weight.role.removesuffix(".down"), self.count
        layer = int(block.split(".")[1])
        weight, bias = (Slice(name, 0, count, GATES) for name in gate_names(layer))
        router = Matrix((weight,), count, x.width, role=f"{block}.router")
        matrices, biases = dict[str, Matrix](), dict[str, Vector]()
        for part in _PARTS:
            stem = f"{block}.{part}"
            if (slices := self._slices.get(f"{stem}.weight")) is not None:
                rows, cols = self._shapes[f"{stem}.weight"]
                matrices[part] = Matrix(slices, rows, cols, count, _of_experts(stem))
            if (slices := self._slices.get(f"{stem}.bias")) is not None:
                biases[part] = Vector(slices, rows * count)
        return MixtureOfExperts(
            down.out, x, router, matrices.get("gate"), matrices["up"], matrices["down"], 1,
            self.recipe.decoder.layers[layer].feed_forward.activation, normalize=False,
            scale=down.scale, residual=down.residual, router_bias=Vector((bias,), count),
            gate_bias=biases.get("gate"), up_bias=biases.get("up"), down_bias=biases.get("down"),
            shared=SHARED,
        )  # fmt: skip

    def _path(self, model: str) -> Path:
        path = Path(model).expanduser()
        return path if path.exists() or not is_id(model) else self._hub.fetch(model)

    def _add(self, number: int, model: str) -> None:
        """Where the weights of one expert are."""
        kind, source, path = self.config.expert_type, f"expert {number}", self._path(model)
        try:
            if isinstance(kind, LoraAdapter):
                found = self.recipe.names
                for stem, term in self._terms(kind, self._usual(tensors_of(path))):
                    self.merged[_of_experts(stem), number] = (term,)
            else:
                checkpoint = open_checkpoint(path)
                tensors = self._usual(checkpoint.tensors)
                (places,) = locate([(self._shapes, self._naming)], tensors, read=set(tensors))
                self.others[source] = replace(checkpoint, tensors=tensors)
                found = {
                    role: tuple(replace(part, source=source) for part in parts)
                    for role, parts in places.items()
                }
        except (InvalidCheckpoint, UnsupportedModel) as error:
            where = f"{self.config.prefix}.*.{self.config.mlp}"
            raise type(error)(f"AnyMoE: {source}, {where} of {model}: {error}") from None
        self._slices = {role: parts + found[role] for role, parts in self._slices.items()}

    def _usual(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of feed-forwards, as transformers calls them."""
        prefix, mlp = re.escape(self.config.prefix), re.escape(self.config.mlp)
        start = re.compile(rf"(?:base_model\.model\.)?{prefix}\.(\d+)\.{mlp}\.")
        names = {name: start.sub(r"model.layers.\1.mlp.", name) for name in tensors}
        return {new: tensors[name] for name, new in names.items() if start.match(name)}

    def _terms(
        self, lora: LoraAdapter, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Term]]:
        """What an adapter adds to matrices, which are named without `.weight`."""
        modules = [f"{n}.mlp.{target}" for n in self.layers for target in lora.target_modules]
        for module in (f"model.layers.{module}" for module in modules):
            stems, _ = next(self._naming.meanings(module), ((), None))
            shapes = [self._shapes.get(f"{stem}.weight", (0, 0)) for stem in stems]
            rows, cols = sum(shape[0] for shape in shapes), max(shapes, default=(0, 0))[1]
            if not rows:
                raise InvalidRequest(f"AnyMoE: the model has no {module} to adapt")
            a = _tensor(tensors, f"{module}.lora_A.weight", (lora.rank, cols))
            b = _tensor(tensors, f"{module}.lora_B.weight", (rows, lora.rank))
            start = 0
            for stem, (count, _) in zip(stems, shapes, strict=True):
                of_b = Stored(b.format, b.row_data(start, start := start + count), None)
                of_a, scale = Stored(a.format, a.data, None), lora.alpha / lora.rank
                yield stem, Term(of_a, of_b, lora.rank, scale)


def gate_names(layer: int) -> tuple[str, str]:
    """What the weight and the bias of a layer's gate are called."""
    return f"moe_gate.{layer}.weight", f"moe_gate.{layer}.bias"


def _layers(config: AnyMoe, recipe: Recipe) -> tuple[int, ...]:
    """Those that get experts, in order."""
    hidden, layers = recipe.decoder.hidden, recipe.decoder.layers
    if config.hidden_size != hidden:
        raise InvalidRequest(f"AnyMoE: hidden_size is {config.hidden_size}, of the model {hidden}")
    chosen = tuple(sorted(set(config.layers))) or tuple(range(len(layers)))
    if not 0 <= chosen[0] <= chosen[-1] < len(layers):
        raise InvalidRequest(f"AnyMoE: layers are {chosen}; the model has 0 to {len(layers) - 1}")
    if not all(isinstance(layers[layer].feed_forward, Mlp) for layer in chosen):
        raise UnsupportedModel("AnyMoE: the model's layers have experts already")
    return chosen


def _of_experts(role: str) -> str:
    return role.replace("feed_forward.", "feed_forward.experts.")


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """One that must be there."""
    found = tensors.get(name)
    if found is None or found.shape != shape:
        problem = "is missing" if found is None else f"has shape {found.shape}"
        raise InvalidCheckpoint(f"the tensor {name!r} {problem}; its shape must be {shape}")
    found.check_format()
    return found
