"""`quantization_config`: how the makers of a model have quantized its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from squall.errors import UnsupportedModel
from squall.quant import awq, gptq

METHODS: Mapping[str, ModuleType] = {"gptq": gptq, "awq": awq}
LARGEST_GROUP = 1 << 16
# The key of quantization_config that names the layout, the known ones, and the default.
_LAYOUTS = {
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2"), "gptq"),
    "awq": ("version", ("gemm",), "gemm"),
}
_HINT = "Use the model as it was before, or a GGUF file"


@dataclass(frozen=True, slots=True)
class Scheme:
    """A method, and its parameters. group: inputs of a group; None: all are one."""

    method: str
    bits: int
    group: int | None
    layout: str
    act_order: bool = False

    def __str__(self) -> str:
        groups = "one group a row" if self.group is None else f"groups of {self.group}"
        order = ", in order of activation" if self.act_order else ""
        name = self.layout if self.method == "gptq" else self.method
        return f"{name.upper()}, {self.bits} bits, {groups}{order}"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Scheme:
        """From quantization_config, or quantize_config.json; UnsupportedModel for any other."""
        method = config.get("quant_method", "gptq" if "bits" in config else None)
        _check("quant_method", method, tuple(METHODS))
        key, known, default = _LAYOUTS[method]
        layout = str(config.get(key) or default).lower()
        _check(key, layout, known)
        bits = config.get("bits", config.get("w_bit"))
        _check("bits", bits, METHODS[method].BITS)
        group = config.get("group_size", config.get("q_group_size"))
        if type(group) is not int or group not in (-1, *range(32, LARGEST_GROUP + 1, 32)):
            raise UnsupportedModel(
                f"quantization_config has group_size {_shown(group)}; "
                "it must be -1 or a multiple of 32"
            )
        rules = config.get("dynamic") or {}
        if not isinstance(rules, dict) or not all(rule.startswith("-:") for rule in rules):
            raise UnsupportedModel(f"quantization_config has rules for single layers. {_HINT}")
        ordered = method == "gptq" and config.get("desc_act") is True
        return cls(method, bits, None if group == -1 else group, layout, ordered)


def _check(key: str, value: object, known: tuple[Any, ...]) -> None:
    if type(value) is bool or value not in known:
        listed = ", ".join(map(str, known))
        raise UnsupportedModel(
            f"quantization_config has {key} {_shown(value)}; known: {listed}. {_HINT}"
        )


def _shown(value: object) -> str:
    return repr(value)[:80]
