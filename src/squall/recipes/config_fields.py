"""A config.json: what transformers calls things, and what of it changes no result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from squall.checkpoints.base import Tensor
from squall.errors import InvalidCheckpoint
from squall.recipes.fields import NEUTRAL, Fields
from squall.recipes.names import Naming

# The key of GGUF files, by which the shared parts ask -> those of config.json; the first there is.
KEYS: Mapping[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads", "num_heads", "attention_heads", "n_heads"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim", "d_kv"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon"),
    "block_count": ("num_hidden_layers", "depth", "num_layers", "n_layers"),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("embed_dim", "hidden_size", "d_model", "dim"),
    "expert_count": ("num_local_experts",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "feed_forward_length": ("intermediate_size", "d_ff", "hidden_dim"),
    "hidden_act": ("hidden_act", "activation", "hidden_activation"),
}
# Leftovers of savers and trainers that are in so many files that naming them would tell nothing.
USUAL = frozenset(
    """
    auto_map bos_token_id eos_token_id model_type output_attentions pad_token_id
    quantization_config torch_dtype unsloth_fixed unsloth_version use_cache
    """.split()  # noqa: SIM905
)


@cache
def _table() -> dict[str, Any]:
    """Made by tools/config_keys.py, which says what is in it."""
    text = files("squall.recipes").joinpath("config_keys.json").read_text("utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def keys_of(architecture: str) -> Mapping[str, Any]:
    """What the class of transformers does with keys: the table's `reads`, `known`, `aliases`."""
    table = _table()["architectures"]
    found: Mapping[str, Any] = table[table[architecture].get("same_as", architecture)]
    return found


def part_keys(model_type: str) -> Mapping[str, Any] | None:
    """The same for a part of a model that sees, by its `model_type`; None: it is unknown."""
    found: Mapping[str, Any] | None = _table()["parts"].get(model_type)
    return found


def by_model_type(model_type: object) -> str | None:
    """The architecture that transformers takes for a `model_type`."""
    table = _table()["architectures"].items()
    return next((name for name, found in table if model_type == found.get("model_type", "")), None)


class ConfigFields(Fields):
    """The values of config.json that the class of transformers reads, and what it takes for others.

    Those of objects in it have dotted keys: `rope_scaling.factor`. Where the class takes a value
    for a missing key, null is not missing. What the class does not read is named in the log.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        keys: Mapping[str, Any],
        naming: Naming,
    ) -> None:
        given, defaults = (
            {keys["aliases"].get(key, key): value for key, value in values.items()}
            for values in (config, keys["reads"])
        )
        read = {key: value for key, value in given.items() if key in defaults}
        super().__init__(dict(flatten(defaults | read)), tensors)
        self.naming = naming
        unread = given.keys() - read.keys() - {*keys["known"], *_table()["known"], *USUAL}
        self.ignored += [key for key in unread if not key.startswith("_")]

    def key(self, key: str) -> str:
        names = KEYS.get(key, (key,))
        return next((name for name in names if name in self._values), names[0])

    def shown(self, key: str) -> str:
        return self.key(key)

    def has_section(self, key: str) -> bool:
        """Whether there is an object of this name, and something in it."""
        return any(name.startswith(f"{key}.") for name in self._values)

    def head(self) -> dict[str, Any]:
        return {"vocab": self.count("vocab_size"), "tied": self._is_tied()}

    def _is_tied(self) -> bool:
        """A file may say so and have a head all the same; then the head counts, if it differs."""
        head, embed = self.naming.name("head.weight"), self.naming.name("embed.weight")
        if head not in self.tensors or embed not in self.tensors:
            return self.flag("tie_word_embeddings", True)
        if not self.flag("tie_word_embeddings", False):
            return False
        same = np.array_equal(self.tensors[head].data, self.tensors[embed].data)
        if same:
            self.tensors_read.add(head)
        return same

    def _is_harmless(self, key: str, value: object) -> bool:
        if key.startswith(("rope_scaling.", "rope_parameters.")):
            self.ignored.append(key)  # for another kind of scaling
            return True
        return value == [] or (isinstance(value, int | float | str) and value in NEUTRAL)


def flatten(
    values: Mapping[str, object], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, object]]:
    """Values that are not null, by their dotted keys."""
    if depth > 8:
        raise InvalidCheckpoint(f"{prefix[:80]!r} in config.json is nested too deeply")
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.", depth + 1)
        elif value is not None:
            yield f"{prefix}{key}", value
