"""Recipes: a checkpoint's configuration -> what the model is, and where its weights lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from squall.checkpoints.base import Checkpoint, Tensor
from squall.checkpoints.quantized import zero_biases
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.files import quote
from squall.program import Names
from squall.recipes import (
    axial_towers,
    clip_towers,
    config,
    gguf,
    mllama_tower,
    mmproj,
    siglip_towers,
    vision,
)
from squall.recipes.config_fields import ConfigFields
from squall.recipes.fields import Fields
from squall.recipes.gguf_parts import NAMING, GgufFields
from squall.recipes.linears import linears, named, stored
from squall.recipes.names import Kind, Naming, Part, check_applied, place
from squall.spec import Decoder

__all__ = ["KNOWN", "Part", "Recipe", "judge", "load", "seeing"]

TOWERS = (axial_towers, clip_towers, mllama_tower, siglip_towers)  # which register what they know
KNOWN = sorted({*gguf.RECIPES, *config.RECIPES, *config.SEERS})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a model is, part by part; a language model has a decoder and no more.

    text: the architecture of the decoder alone, if that has one.
    """

    architecture: str
    parts: tuple[Part, ...]
    text: str = ""

    def part(self, kind: Kind) -> Part:
        """The first part of a kind; KeyError if there is none."""
        return {part.kind: part for part in reversed(self.parts)}[kind]

    @property
    def decoder(self) -> Decoder:
        return cast(Decoder, self.part("decoder").spec)

    @property
    def sees(self) -> bool:
        return any(part.kind == "tower" for part in self.parts)

    @property
    def names(self) -> Names:
        """Where the decoder's weights lie."""
        return self.part("decoder").names

    @property
    def all_names(self) -> Names:
        return {role: place for part in self.parts for role, place in part.names.items()}

    @property
    def naming(self) -> Naming:
        return self.part("decoder").naming


def load(checkpoint: Checkpoint, architecture: str | None = None) -> Recipe:
    """The recipe of a checkpoint; what it does not use of the files, it refuses.

    architecture: what the model is, if config.json does not say, or says something else: a class
        of transformers or a name such as "mistral".
    """
    if checkpoint.kind == "gguf":
        if architecture is not None:
            raise InvalidRequest("a GGUF file says what it is; an architecture is for config.json")
        return _load_gguf(checkpoint)
    check_applied(checkpoint)
    name = config.architecture(checkpoint.metadata, architecture)
    if checkpoint.kind == "uqff":
        return _load_uqff(name, checkpoint)
    fields = config.fields(checkpoint.metadata, checkpoint.tensors, name)
    config.check_depth(fields)
    fields.tensors_read |= zero_biases(checkpoint.tensors)
    return _from_config(name, checkpoint, checkpoint.tensors, fields)


def _from_config(
    name: str, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], fields: ConfigFields
) -> Recipe:
    text = config.text_architecture(checkpoint.metadata, name)
    decoder = config.RECIPES[text].function(fields)
    parts = vision.parts(name, checkpoint.metadata, fields, decoder)
    sees = any(part.kind == "tower" for part in parts) and not decoder.recalls
    decoder = replace(decoder, sees=sees)
    recipe = _finish(name, tensors, fields, Part("decoder", decoder, fields.naming), *parts)
    return replace(recipe, text=text)


def seeing(recipe: Recipe, tower: Checkpoint) -> Recipe:
    """The same model with the tower of an mmproj file, which `mmproj.opened` has opened."""
    seen = mmproj.add(recipe.decoder, tower, scaled=recipe.architecture == "granite")
    text = recipe.part("decoder")
    return replace(recipe, parts=(replace(text, spec=replace(recipe.decoder, sees=True)), *seen))


def judge(metadata: Mapping[str, object], architecture: str | None = None) -> None:
    """Raise UnsupportedModel if there is no recipe for what is known of a model's metadata."""
    if "general.architecture" in metadata:
        _gguf_architecture(metadata)
    elif metadata.keys() & {"architectures", "model_type"}:
        config.architecture(metadata, architecture)


def _load_uqff(name: str, checkpoint: Checkpoint) -> Recipe:
    """Once without the linears, for their order, and then with them under their usual names."""
    text = config.text_architecture(checkpoint.metadata, name)
    residual = {n: t for n, t in checkpoint.tensors.items() if not n.startswith("uqff.")}
    fields = config.fields(checkpoint.metadata, residual, name)
    config.check_depth(fields)
    order = linears(text, config.RECIPES[text].function(fields), fields.naming)
    tensors, originals = named(order, checkpoint.tensors)
    fields = config.fields(checkpoint.metadata, tensors, name)
    recipe = _from_config(name, checkpoint, tensors, fields)
    parts = tuple(replace(part, names=stored(part.names, originals)) for part in recipe.parts)
    return replace(recipe, parts=parts)


def _gguf_architecture(metadata: Mapping[str, object]) -> str:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InvalidCheckpoint("the metadata key general.architecture is missing or not a string")
    if architecture == "clip":
        kind = metadata.get("clip.projector_type", "mlp")
        raise UnsupportedModel(
            f"the file is the tower of a model that sees (mmproj, {quote(str(kind))}); open the "
            "model's own GGUF file, with --mmproj and this one"
        )
    if architecture not in gguf.RECIPES:
        known = ", ".join(sorted(gguf.RECIPES))
        raise UnsupportedModel(f"unknown architecture {quote(architecture)}; known: {known}")
    return architecture


def _load_gguf(checkpoint: Checkpoint) -> Recipe:
    architecture = _gguf_architecture(checkpoint.metadata)
    kind = checkpoint.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(
            f"the file is of type {quote(str(kind))}; only whole models can be run"
        )
    fields = GgufFields(architecture, checkpoint.metadata, checkpoint.tensors)
    decoder = Part("decoder", gguf.RECIPES[architecture](fields), NAMING)
    return _finish(architecture, checkpoint.tensors, fields, decoder)


def _finish(
    architecture: str, tensors: Mapping[str, Tensor], fields: Fields, *parts: Part
) -> Recipe:
    """Find all weights of all parts; what of the configuration or the tensors is left, refuse."""
    fields.check_all_read()
    return Recipe(architecture, place(parts, tensors, read=fields.tensors_read))
