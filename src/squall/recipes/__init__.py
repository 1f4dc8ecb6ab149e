"""Recipes: a checkpoint's configuration -> what the model is, and where its weights lie."""

from __future__ import annotations

from dataclasses import dataclass

from squall.checkpoints.base import Checkpoint
from squall.checkpoints.gguf_header import quote
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.program import Names
from squall.recipes.fields import Fields
from squall.recipes.gguf import RECIPES
from squall.recipes.names import locate
from squall.roles import roles
from squall.spec import Decoder

__all__ = ["KNOWN", "Recipe", "load"]

KNOWN = sorted(RECIPES)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model's Spec and the places of its weights in the checkpoint."""

    architecture: str
    decoder: Decoder
    names: Names


def load(checkpoint: Checkpoint) -> Recipe:
    """The recipe of a GGUF checkpoint; what it does not use of the file, it refuses."""
    architecture = checkpoint.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InvalidCheckpoint("the metadata key general.architecture is missing or not a string")
    kind = checkpoint.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModel(
            f"the file is of type {quote(str(kind))}; only whole models can be run"
        )
    if architecture not in RECIPES:
        known = ", ".join(KNOWN)
        raise UnsupportedModel(f"unknown architecture {quote(architecture)}; known: {known}")
    fields = Fields(architecture, checkpoint.metadata, checkpoint.tensors)
    decoder = RECIPES[architecture](fields)
    fields.check_all_read()
    names = locate(roles(decoder), checkpoint.tensors, read=fields.tensors_read)
    return Recipe(architecture, decoder, names)
