"""`quantization_config`: how the makers of a model have quantized its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from squall.errors import UnsupportedModel
from squall.quant import awq, gptq

METHODS: Mapping[str, ModuleType] = {"gptq": gptq, "awq": awq}
# Values of quantization_config that other kernels than these or other layouts belong to.
_LAYOUTS = {
    "gptq": ("checkpoint_format", {"gptq", "gptq_v2"}, "gptq"),
    "awq": ("version", {"gemm"}, "gemm"),
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
        if method not in METHODS:
            raise UnsupportedModel(
                f"quantization_config has quant_method {_shown(method)}; "
                f"known: {', '.join(METHODS)}. {_HINT}"
            )
        key, known, default = _LAYOUTS[method]
        layout = str(config.get(key) or default).lower()
        bits = config.get("bits", config.get("w_bit"))
        group = config.get("group_size", config.get("q_group_size"))
        _check(key, layout, known)
        _check("bits", bits, set(METHODS[method].BITS))
        if (
            type(group) is not int
            or not (group == -1 or 32 <= group <= 1 << 20)
            or group % 32 > 0 < group
        ):
            raise UnsupportedModel(
                f"quantization_config has group_size {_shown(group)}; "
                "it must be -1 or a multiple of 32"
            )
        dynamic = config.get("dynamic") or {}
        if any(not str(rule).startswith("-:") for rule in dynamic):
            raise UnsupportedModel(f"quantization_config has rules for single layers. {_HINT}")
        ordered = method == "gptq" and config.get("desc_act") is True
        return cls(method, bits, None if group == -1 else group, layout, ordered)


def _check(key: str, value: object, known: set[Any]) -> None:
    if type(value) is bool or value not in known:
        listed = ", ".join(map(str, sorted(known)))
        raise UnsupportedModel(
            f"quantization_config has {key} {_shown(value)}; known: {listed}. {_HINT}"
        )


def _shown(value: object) -> str:
    return repr(value)[:80]
