"""How a model's makers would have it sampled: generation_config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squall.engine.sampling import NUMBERS, Sampling
from squall.errors import InvalidCheckpoint, InvalidRequest
from squall.files import read_json

FILE = "generation_config.json"
KEYS = [name for name, number in NUMBERS.items() if number.stored]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Fields of `Sampling` that count where the caller says nothing; without a file, none."""

    values: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> GenerationDefaults:
        """Read a folder's generation_config.json; `do_sample: false` is temperature 0."""
        config = read_json(Path(path) / FILE) or {}
        values = {key: config[key] for key in KEYS if config.get(key) is not None}
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        found = cls(values)
        try:
            found.sampling({})
        except InvalidRequest as error:
            raise InvalidCheckpoint(f"{FILE}: {error}") from None
        return found

    def sampling(self, given: Mapping[str, Any]) -> Sampling:
        """The caller's parameters, where they are not None; then these; then Squall's."""
        chosen = {key: value for key, value in given.items() if value is not None}
        return Sampling(**{**self.values, **chosen})
