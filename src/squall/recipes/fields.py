"""A checkpoint's configuration, read with types and bounds; what nobody read is an error."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from squall.checkpoints.base import Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote

NEUTRAL = (0, "", "none")  # what changes nothing; 0 also equals False and 0.0
LOG = logging.getLogger("squall")


class Fields:
    """Typed values of one checkpoint, and its tensors. Parts ask by GGUF's keys, without prefix."""

    def __init__(self, values: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.tensors_read: set[str] = set()
        self.ignored: list[str] = []
        self._values = values
        self._read: set[str] = set()

    def key(self, key: str) -> str:
        """The key as the values have it."""
        return key

    def shown(self, key: str) -> str:
        """The key as the file has it."""
        return key

    def has(self, key: str) -> bool:
        return self.key(key) in self._values

    def skip(self, *keys: str) -> None:
        """These are known, and change nothing here."""
        self._read.update(keys)

    def count(self, key: str, default: int | None = None, *, high: int = 1 << 24) -> int:
        """An integer in `1..high`."""
        return self._integer(key, self._value(key, default), 1, high)

    def counts(self, key: str, *, layers: int) -> tuple[int, ...]:
        """One positive integer a layer; the file may hold a single one for all."""
        value = self._value(key, None)
        several = isinstance(value, np.ndarray | list)
        items = self._list(key, value, layers) if several else [value] * layers
        return tuple(self._integer(key, item, 1, 1 << 24) for item in items)

    def number(
        self, key: str, default: float | None = None, *, low: float = 1e-6, high: float = 1e9
    ) -> float:
        """A finite number above `low`, at most `high`."""
        return self._number(key, self._value(key, default), low, high)

    def numbers(self, key: str, size: int) -> tuple[float, ...]:
        items = self._list(key, self._value(key, None), size)
        return tuple(self._number(key, item, 1e-6, 1e9) for item in items)

    def optional(self, key: str) -> float | None:
        """A positive number, or None when the key is missing or zero (which means "off")."""
        return None if self._off(key) else self.number(key)

    def optional_count(self, key: str) -> int | None:
        """A positive integer, or None when the key is missing or zero (which means "off")."""
        return None if self._off(key) else self.count(key, high=1 << 30)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._invalid(key, value, "true or false")
        return value

    def word(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._invalid(key, value, "a string")
        return value

    def words(self, key: str, *, layers: int) -> tuple[str, ...]:
        """One string a layer."""
        items = self._list(key, self._value(key, None), layers)
        return tuple(str(item) for item in items)

    def indices(self, key: str, *, below: int) -> tuple[int, ...]:
        """A list of integers such as layers, empty when the key is missing."""
        value = self._value(key, [])
        if not isinstance(value, np.ndarray | list) or len(value) > below:
            raise self._invalid(key, value, "a list of integers")
        return tuple(self._integer(key, item, 0, below - 1) for item in value)

    def pattern(self, key: str, default: int, *, layers: int) -> tuple[bool, ...]:
        """A mark a layer: the file's list, or all but every n-th layer (all, where n is 0)."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray | list):
            return tuple(bool(item) for item in self._list(key, value, layers))
        period = self._integer(key, value, 0, 1 << 16)
        return tuple(period == 0 or i % period < period - 1 for i in range(layers))

    def factors(self, tensor: str, size: int) -> tuple[float, ...] | None:
        """A small float tensor of positive numbers, or None when the file has none of that name."""
        if tensor not in self.tensors:
            return None
        self.tensors_read.add(tensor)
        shape = self.tensors[tensor].shape
        if shape != (size,):
            raise InvalidCheckpoint(
                f"tensor {tensor!r} has shape {shape}, the metadata asks for ({size},)"
            )
        values = tuple(float(v) for v in self.tensors[tensor].to_float32())
        if not all(math.isfinite(v) and 1e-6 < v <= 1e9 for v in values):
            raise InvalidCheckpoint(f"tensor {tensor!r} holds numbers outside 1e-6..1e9")
        return values

    def head(self) -> dict[str, Any]:
        """Fields of a `Decoder` that say what it begins and ends with, as far as the file does."""
        raise NotImplementedError

    def check_all_read(self) -> None:
        """Raise UnsupportedModel when the recipe did not read a key that may matter.

        What matters to no recipe is named in the log.
        """
        unread = (key for key in self._values if key not in self._read)
        wrong = sorted(key for key in unread if not self._is_harmless(key, self._values[key]))
        if wrong:
            keys = ", ".join(quote(self.shown(key)) for key in wrong[:6])
            raise UnsupportedModel(
                f"the metadata has {keys}, which Squall cannot follow in this architecture; "
                "ignoring it could change the results"
            )
        if self.ignored:
            keys = ", ".join(quote(key) for key in sorted(self.ignored)[:20])
            LOG.warning("the metadata has keys that mean nothing to this architecture: %s", keys)

    def _is_harmless(self, key: str, value: object) -> bool:
        raise NotImplementedError

    def _value(self, key: str, default: object) -> object:
        self._read.add(self.key(key))
        value = self._values.get(self.key(key), default)
        if value is None:
            raise InvalidCheckpoint(f"metadata key {self.shown(key)} is missing")
        return value

    def _off(self, key: str) -> bool:
        self._read.add(self.key(key))
        value = self._values.get(self.key(key), 0)
        return isinstance(value, int | float) and value == 0

    def _integer(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise self._invalid(key, value, "an integer")
        if not low <= value <= high:
            raise self._invalid(key, value, f"in {low}..{high}")
        return int(value)

    def _number(self, key: str, value: object, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._invalid(key, value, "a number")
        if not (low < value <= high and math.isfinite(value)):
            raise self._invalid(key, value, f"above {low:g} and at most {high:g}")
        return float(value)

    def _list(self, key: str, value: object, size: int) -> list[object]:
        if not isinstance(value, np.ndarray | list) or len(value) != size:
            shown = f"a list of {len(value)}" if isinstance(value, np.ndarray | list) else value
            raise self._invalid(key, shown, f"a list of {size}")
        return value.tolist() if isinstance(value, np.ndarray) else value

    def _invalid(self, key: str, value: object, allowed: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"metadata key {self.shown(key)} is {repr(value)[:99]}; it must be {allowed}"
        )
