"""Recipes: a checkpoint's configuration -> what the model is, and where its weights lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from squall.checkpoints.base import Checkpoint, Tensor
from squall.checkpoints.quantized import zero_biases
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.files import quote
from squall.program import Names
from squall.recipes import config, gguf
from squall.recipes.fields import Fields
from squall.recipes.gguf_parts import NAMING, GgufFields
from squall.recipes.linears import linears, named
from squall.recipes.names import Naming, locate
from squall.roles import roles
from squall.spec import Decoder

__all__ = ["KNOWN", "Recipe", "judge", "load"]

KNOWN = sorted({*gguf.RECIPES, *config.RECIPES})


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model's Spec and the places of its weights in the checkpoint, found by its naming."""

    architecture: str
    decoder: Decoder
    names: Names
    naming: Naming


def load(checkpoint: Checkpoint, architecture: str | None = None) -> Recipe:
    """The recipe of a checkpoint; what it does not use of the files, it refuses.

    architecture: what the model is, if config.json does not say, or says something else: a class
        of transformers or a name such as "mistral".
    """
    if checkpoint.kind == "gguf":
        if architecture is not None:
            raise InvalidRequest("a GGUF file says what it is; an architecture is for config.json")
        return _load_gguf(checkpoint)
    if checkpoint.metadata.get("quantization_config") and not checkpoint.quantization:
        raise UnsupportedModel("config.json has a quantization_config that was not applied")
    name = config.architecture(checkpoint.metadata, architecture)
    if checkpoint.kind == "uqff":
        return _load_uqff(name, checkpoint)
    entry = config.RECIPES[name]
    fields = config.fields(checkpoint.metadata, checkpoint.tensors, name)
    config.check_depth(fields)
    fields.tensors_read |= zero_biases(checkpoint.tensors)
    return _finish(name, checkpoint.tensors, entry.function(fields), fields, fields.naming)


def judge(metadata: Mapping[str, object], architecture: str | None = None) -> None:
    """Raise UnsupportedModel if there is no recipe for what is known of a model's metadata."""
    if "general.architecture" in metadata:
        _gguf_architecture(metadata)
    elif metadata.keys() & {"architectures", "model_type"}:
        config.architecture(metadata, architecture)


def _load_uqff(name: str, checkpoint: Checkpoint) -> Recipe:
    """Once without the linears, for their order, and then with them under their usual names."""
    entry = config.RECIPES[name]
    residual = {n: t for n, t in checkpoint.tensors.items() if not n.startswith("uqff.")}
    fields = config.fields(checkpoint.metadata, residual, name)
    config.check_depth(fields)
    order = linears(name, entry.function(fields), fields.naming)
    tensors, originals = named(order, checkpoint.tensors)
    fields = config.fields(checkpoint.metadata, tensors, name)
    recipe = _finish(name, tensors, entry.function(fields), fields, fields.naming)
    names = {
        role: tuple(replace(part, tensor=originals.get(part.tensor, part.tensor)) for part in parts)
        for role, parts in recipe.names.items()
    }
    return replace(recipe, names=MappingProxyType(names))


def _gguf_architecture(metadata: Mapping[str, object]) -> str:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InvalidCheckpoint("the metadata key general.architecture is missing or not a string")
    if architecture not in gguf.RECIPES:
        known = ", ".join(sorted(gguf.RECIPES))
        raise UnsupportedModel(f"unknown architecture {quote(architecture)}; known: {known}")
    return architecture


def _load_gguf(checkpoint: Checkpoint) -> Recipe:
    kind = checkpoint.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(
            f"the file is of type {quote(str(kind))}; only whole models can be run"
        )
    architecture = _gguf_architecture(checkpoint.metadata)
    fields = GgufFields(architecture, checkpoint.metadata, checkpoint.tensors)
    return _finish(
        architecture, checkpoint.tensors, gguf.RECIPES[architecture](fields), fields, NAMING
    )


def _finish(
    architecture: str,
    tensors: Mapping[str, Tensor],
    decoder: Decoder,
    fields: Fields,
    naming: Naming,
) -> Recipe:
    fields.check_all_read()
    names = locate(roles(decoder), tensors, naming, read=fields.tensors_read)
    return Recipe(architecture, decoder, names, naming)
