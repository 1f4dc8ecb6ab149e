"""A checkpoint's metadata, read with types and bounds; what nobody read is an error."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from squall.checkpoints.base import Tensor
from squall.checkpoints.gguf_header import quote
from squall.errors import InvalidCheckpoint, UnsupportedModel

HARMLESS = frozenset(
    {
        "attention.layer_norm_epsilon",  # each recipe reads the epsilon of its own kind of norm
        "attention.layer_norm_rms_epsilon",
        "mm.tokens_per_image",  # of a vision tower that is not in this file
        "rope.scaling.finetuned",
        "tensor_data_layout",  # a remark of early converters
        "vocab_size",  # the embedding table has the true size
    }
)
NEUTRAL = (0, "", "none")  # 0 also equals False and 0.0
NEUTRAL_BY_KEY: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.output_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,),
}


class Fields:
    """The metadata of one architecture (keys without its prefix), and the file's tensors."""

    def __init__(
        self, architecture: str, metadata: Mapping[str, object], tensors: Mapping[str, Tensor]
    ) -> None:
        self.architecture = architecture
        self.tensors = tensors
        prefix = f"{architecture}."
        keys = [key for key in metadata if key.startswith(prefix)]
        self._values = {key.removeprefix(prefix): metadata[key] for key in keys}
        self._read: set[str] = set()
        self.tensors_read: set[str] = set()

    def has(self, key: str) -> bool:
        return key in self._values

    def count(self, key: str, default: int | None = None, *, high: int = 1 << 24) -> int:
        """An integer in `1..high`."""
        return self._integer(key, self._value(key, default), 1, high)

    def counts(self, key: str, default: int | None = None, *, layers: int) -> tuple[int, ...]:
        """One positive integer a layer; the file may hold a single one for all."""
        value = self._value(key, default)
        several = isinstance(value, np.ndarray | list)
        items = self._list(key, value, layers) if several else [value] * layers
        return tuple(self._integer(key, item, 1, 1 << 24) for item in items)

    def number(
        self, key: str, default: float | None = None, *, low: float = 1e-6, high: float = 1e9
    ) -> float:
        """A finite number above `low`, at most `high`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._invalid(key, value, "a number")
        if not (math.isfinite(value) and low < value <= high):
            raise self._invalid(key, value, f"above {low:g} and at most {high:g}")
        return float(value)

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

    def word(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._invalid(key, value, "a string")
        return value

    def pattern(self, key: str, default: int, *, layers: int) -> tuple[bool, ...]:
        """Which layers have a window: the file's list, or all but every n-th layer."""
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

    def check_all_read(self) -> None:
        """Raise UnsupportedModel when the recipe did not read a key that may matter."""
        unread = {k: v for k, v in self._values.items() if k not in self._read | HARMLESS}
        wrong = sorted(key for key, value in unread.items() if not _is_neutral(key, value))
        if wrong:
            keys = ", ".join(quote(f"{self.architecture}.{key}") for key in wrong[:6])
            raise UnsupportedModel(
                f"the metadata has {keys}, which Squall cannot follow in this architecture; "
                "ignoring it could change the results"
            )

    def _value(self, key: str, default: object) -> object:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise InvalidCheckpoint(f"metadata key {self.architecture}.{key} is missing")
        return value

    def _off(self, key: str) -> bool:
        self._read.add(key)
        value = self._values.get(key, 0)
        return isinstance(value, int | float) and value == 0

    def _integer(self, key: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise self._invalid(key, value, "an integer")
        if not low <= value <= high:
            raise self._invalid(key, value, f"in {low}..{high}")
        return int(value)

    def _list(self, key: str, value: object, layers: int) -> list[object]:
        assert isinstance(value, np.ndarray | list)
        if len(value) != layers:
            raise self._invalid(key, f"a list of {len(value)}", f"a list of {layers}, one a layer")
        return list(value)

    def _invalid(self, key: str, value: object, allowed: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"metadata key {self.architecture}.{key} is {repr(value)[:99]}; it must be {allowed}"
        )


def _is_neutral(key: str, value: object) -> bool:
    return isinstance(value, int | float | str) and value in NEUTRAL_BY_KEY.get(key, NEUTRAL)
