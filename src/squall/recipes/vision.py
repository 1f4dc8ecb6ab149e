"""The towers and connectors of models that see: config.json -> parts.

One function per architecture; the language model within is one of `recipes.config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes.config import NAMES, SEERS
from squall.recipes.config_fields import ConfigFields, part_keys
from squall.recipes.names import Part
from squall.spec import Decoder


@dataclass(frozen=True, slots=True)
class Sections:
    """What a function reads: the objects of config.json, and the tensors.

    text: the language model's fields, which also tell which tensors were read. decoder: what they
    became.
    """

    config: Mapping[str, Any]
    text: ConfigFields
    decoder: Decoder

    def kind(self, key: str, model_type: str) -> str:
        """The `model_type` of the object `key`, or this if it does not say."""
        inner = self.config.get(key, {})
        if not isinstance(inner, dict):
            raise InvalidCheckpoint(f"{key} in config.json is no object")
        return str(inner.get("model_type", model_type))

    def part(self, key: str, model_type: str, *, fixed: bool = False) -> ConfigFields:
        """The object `key`, of a `model_type` if it does not say; fixed: whatever it says."""
        kind, inner = self.kind(key, model_type), self.config.get(key, {})
        kind = model_type if fixed else kind
        keys = part_keys(f"{kind}_vision") or part_keys(kind)  # early files have the model's
        if keys is None:
            raise UnsupportedModel(f"{key} is of an unknown kind: {quote(kind)}")
        return ConfigFields(inner, self.text.tensors, keys, self.text.naming)

    def top(self, model_type: str) -> ConfigFields:
        """What is said beside the parts."""
        keys = part_keys(model_type)
        assert keys is not None
        fields = ConfigFields(self.config, self.text.tensors, keys, self.text.naming)
        fields.skip("tie_word_embeddings")  # the tensors tell
        return fields

    def before(self, stem: str) -> str:
        """What the names of tensors begin with before `stem`, as versions differ in it."""
        names = (name for name in self.text.tensors if stem in name)
        return next((name.partition(stem)[0] for name in names), "")


PartsFunction = Callable[[Sections], tuple[Part, ...]]
F = TypeVar("F", bound=PartsFunction)
_PARTS: dict[str, PartsFunction] = {}


def seer(architecture: str, name: str, text: str) -> Callable[[F], F]:
    """Register a function for a value of `architectures`, a name for people, and a model type."""

    def register(function: F) -> F:
        _PARTS[architecture] = function
        SEERS[architecture] = text
        NAMES[name] = architecture
        return function

    return register


def parts(
    architecture: str, config: Mapping[str, Any], text: ConfigFields, decoder: Decoder
) -> tuple[Part, ...]:
    if architecture not in _PARTS:
        return ()
    return _PARTS[architecture](Sections(config, text, decoder))
