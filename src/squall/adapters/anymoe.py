"""AnyMoE: the feed-forward layers of other models as experts beside a model's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from squall import decoder
from squall import program as p
from squall.adapters.parts import Parts, array_of
from squall.adapters.peft import tensors_of
from squall.adapters.target import Target
from squall.checkpoints import Checkpoint, open_checkpoint
from squall.checkpoints.base import Tensor
from squall.checkpoints.hub import Hub
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, UnsupportedModel
from squall.recipes import Recipe
from squall.recipes.modules import namings
from squall.recipes.names import Naming, locate
from squall.roles import roles
from squall.spec import Mlp
from squall.weights import Term

SHARED = p.Index("shared")
GATES = "gates"  # their source in a weight store
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_PARTS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class FineTuned:
    """Experts are whole feed-forward layers of other checkpoints."""


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """Experts are the model's own feed-forward layers, to which adapters were added."""

    rank: Count
    alpha: Positive
    target_modules: Sequence[str]

    def __post_init__(self) -> None:
        _check(self)


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

    hidden_size: Count
    dataset_json: str
    prefix: str
    mlp: str
    model_ids: Annotated[Sequence[str], Field(min_length=1, max_length=255)]
    expert_type: FineTuned | LoraAdapter
    layers: Sequence[int] = ()
    lr: Positive = 1e-3
    epochs: Count = 100
    batch_size: Count = 4
    gate_model_id: str | None = None
    training: bool = True
    loss_csv_path: Annotated[str, Field(pattern=r"\.csv$")] | None = None

    def __post_init__(self) -> None:
        _check(self)
        if not self.training and self.gate_model_id is None:
            raise InvalidRequest("AnyMoE: gate_model_id must say where the gates are")


def _check(given: LoraAdapter | AnyMoe) -> None:
    try:
        for name, kind in get_type_hints(type(given), include_extras=True).items():
            TypeAdapter(kind).validate_python(value := getattr(given, name), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise InvalidRequest(f"AnyMoE: {name} is {value!r:.99}: {problem}") from None


class Experts:
    """The experts of a model; `others` and `merged` are for its weight store."""

    def __init__(
        self, config: AnyMoe, checkpoint: Checkpoint, recipe: Recipe, hub: Hub | None = None
    ) -> None:
        self.config, self.recipe, self._hub = config, recipe, hub or Hub()
        self._target = Target.of(checkpoint, recipe)
        self.count, self.layers = len(config.model_ids) + 1, _layers(config, recipe)
        self._naming = replace(namings(recipe.architecture)[0], layer="model.layers.{}.")
        stems = {f"layers.{layer}.feed_forward.{part}" for layer in self.layers for part in _PARTS}
        shapes = roles(recipe.decoder)
        self._shapes = {role: shapes[role] for role in shapes if role.rpartition(".")[0] in stems}
        self._slices = {role: recipe.names[role] for role in self._shapes}
        self.others: dict[str, Checkpoint] = {}
        self.merged: dict[p.Site, tuple[Term, ...]] = {}
        for number, model in enumerate(config.model_ids, start=1):
            self._add(number, model)

    def program(self, context: int) -> p.Program:
        """The model's, with a mixture of experts in place of each layer's feed-forward."""
        spec, names = self.recipe.decoder, self.recipe.names
        own = decoder.compile(spec, names, context=context, whole=True)
        ups = {f"layers.{layer}.feed_forward.up" for layer in self.layers}
        upper = [
            op for op in own.ops if isinstance(op, p.Linear | p.GatedLinear) and op.out.name in ups
        ]
        inner = {op.out: op.x for op in upper}
        ops = [
            self._mixture(op, inner[op.x]) if isinstance(op, p.Linear) and op.x in inner else op
            for op in own.ops
            if op.out not in inner
        ]
        values = tuple(value for value in own.values if value not in inner)
        return replace(own, ops=tuple(ops), values=values)

    def gates(self) -> Checkpoint:
        folder = self._hub.path(str(self.config.gate_model_id))
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelNotFound(f"AnyMoE: {folder} has {len(files)} safetensors files, not 1")
        tensors = tensors_of(folder, files[0])
        sizes = {"weight": (self.count, self.config.hidden_size), "bias": (self.count,)}
        shapes = {f"layers.{n}.gate.{kind}": sizes[kind] for n, kind in product(self.layers, sizes)}
        locate([(shapes, Naming({"gate": ""}, "moe_gate.{}"))], tensors, read=set(tensors))
        return Checkpoint(folder, {}, tensors, files[0].stat().st_size)

    def _mixture(self, down: p.Linear, x: p.Value) -> p.MixtureOfExperts:
        block, count = down.weight.role.removesuffix(".down"), self.count
        layer = int(block.split(".")[1])
        weight, bias = (p.Slice(name, 0, count, GATES) for name in gate_names(layer))
        router = p.Matrix((weight,), count, x.width, role=f"{block}.router")
        matrices, biases = dict[str, p.Matrix](), dict[str, p.Vector]()
        for part in _PARTS:
            stem = f"{block}.{part}"
            if (slices := self._slices.get(f"{stem}.weight")) is not None:
                rows, cols = self._shapes[f"{stem}.weight"]
                matrices[part] = p.Matrix(slices, rows, cols, count, _of_experts(stem))
            if (slices := self._slices.get(f"{stem}.bias")) is not None:
                biases[part] = p.Vector(slices, rows * count)
        return p.MixtureOfExperts(
            down.out, x, router, matrices.get("gate"), matrices["up"], matrices["down"], 1,
            self.recipe.decoder.layers[layer].feed_forward.activation, normalize=False,
            scale=down.scale, residual=down.residual, router_bias=p.Vector((bias,), count),
            gate_bias=biases.get("gate"), up_bias=biases.get("up"), down_bias=biases.get("down"),
            shared=SHARED,
        )  # fmt: skip

    def _add(self, number: int, model: str) -> None:
        kind, source = self.config.expert_type, f"expert {number}"
        try:
            path = self._hub.path(model)
            if isinstance(kind, LoraAdapter):
                found = self.recipe.names
                for (stem, _), term in self._terms(kind, self._usual(tensors_of(path))).items():
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
        except (InvalidCheckpoint, ModelNotFound, UnsupportedModel) as error:
            where = f"{self.config.prefix}.*.{self.config.mlp}"
            raise type(error)(f"AnyMoE: {source}, {where} of {model}: {error}") from None
        self._slices = {role: parts + found[role] for role, parts in self._slices.items()}

    def _usual(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of feed-forwards, as transformers calls them."""
        prefix, mlp = re.escape(self.config.prefix), re.escape(self.config.mlp)
        start = re.compile(rf"(?:base_model\.model\.)?{prefix}\.(\d+)\.{mlp}\.")
        names = {name: start.sub(r"model.layers.\1.mlp.", name) for name in tensors}
        return {new: tensors[name] for name, new in names.items() if start.match(name)}

    def _terms(self, lora: LoraAdapter, tensors: Mapping[str, Tensor]) -> Mapping[p.Site, Term]:
        """What an adapter adds to the model's own matrices."""
        parts = Parts(self._target, as_gguf=False)
        for layer, target in product(self.layers, lora.target_modules):
            module = f"model.layers.{layer}.mlp.{target}"
            a, b = (tensors.get(f"{module}.lora_{part}.weight") for part in "AB")
            if a is None or b is None or len(a.shape) != 2 or a.rows != lora.rank:
                raise InvalidCheckpoint(f"{module} has no weights of LoRA of rank {lora.rank}")
            parts.low_rank(module, array_of(a)[None], array_of(b)[None], lora.alpha / lora.rank)
        return parts.terms()


def gate_names(layer: int) -> tuple[str, str]:
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
