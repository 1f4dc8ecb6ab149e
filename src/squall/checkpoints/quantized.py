"""Folders whose weights are quantized by GPTQ or AWQ: several stored tensors stand for a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Pages, Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote, read_json
from squall.quant import FORMATS, integers
from squall.quant.grouped import Grouped, block_for
from squall.quant.scheme import METHODS, Scheme

CONFIG = "quantize_config.json"
_MAIN = ".qweight"
_DTYPES = {
    "qweight": ("i32",),
    "qzeros": ("i32",),
    "g_idx": ("i32",),
    "scales": ("f16", "bf16", "f32"),
}


@dataclass(frozen=True, eq=False)
class GroupedTensor(Tensor):
    """A quantized weight, made from `stored` tensors when asked for.

    pages: of most of them. zero_bias: the name of its bias, if that is there and 0: some writers
    add one to any weight.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    scheme: Scheme
    stored: Mapping[str, Tensor]
    zero_bias: str | None
    pages: Pages | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def order(self) -> NDArray[np.uint32] | None:
        return self._grouped().order

    def row_data(self, start: int, stop: int) -> NDArray[np.uint8]:
        try:
            return self._grouped().blocks(start, stop)
        except InvalidCheckpoint as error:
            raise InvalidCheckpoint(f"tensor {quote(self.name)}: {error}") from None

    def to_float32(self) -> NDArray[np.float32]:
        return self._grouped().dequantize(0, self.rows)

    def _grouped(self) -> Grouped:
        scheme, inputs = self.scheme, self.cols
        group = scheme.group or inputs
        words = {name: self.stored[name].data.view("<u4") for name in ("qweight", "qzeros")}
        shaped = {name: data.reshape(self.stored[name].shape) for name, data in words.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            scales = self.stored["scales"].to_float32().astype(np.float16)
        groups = self._groups(group, len(scales))
        gptq = {"bits": scheme.bits, "less_one": scheme.layout == "gptq"}
        own = gptq if scheme.method == "gptq" else {}
        made: Grouped = METHODS[scheme.method].grouped(
            shaped["qweight"], shaped["qzeros"], scales, groups, group=group, **own
        )
        return made

    def _groups(self, group: int, count: int) -> NDArray[np.int32]:
        if "g_idx" not in self.stored:
            return (np.arange(self.cols) // group).astype(np.int32)
        groups = self.stored["g_idx"].data.view("<i4")
        if groups.min() < 0 or groups.max() >= count:
            raise InvalidCheckpoint(
                f"tensor {quote(self.name)}: g_idx goes from {groups.min()} to {groups.max()}; "
                f"there are {count} groups"
            )
        return groups


def quantization(folder: Path, config: Mapping[str, Any]) -> Scheme | None:
    """How the weights of a folder are quantized; None: they are not."""
    found = config.get("quantization_config")
    if found is None:
        found = read_json(folder / CONFIG)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise InvalidCheckpoint("quantization_config is not an object")
    return Scheme.of(found)


def with_weights(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, with one `.weight` for all that are stored for a quantized one."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith(_MAIN):
            weight = _weight(name.removesuffix(_MAIN), tensors, scheme)
            if weight.name in tensors:
                raise InvalidCheckpoint(f"there are both {quote(weight.name)} and {quote(name)}")
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                found.pop(f"{weight.name.removesuffix('.weight')}.{part}", None)
            found[weight.name] = weight
    return found


def _weight(stem: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> GroupedTensor:
    method, main = METHODS[scheme.method], tensors[stem + _MAIN]
    if len(main.shape) != 2 or 0 in main.shape:
        raise InvalidCheckpoint(f"tensor {quote(main.name)} has shape {main.shape}, not two sizes")
    outputs, inputs = method.size(scheme.bits, main.shape)
    if outputs * scheme.bits % 32:
        raise InvalidCheckpoint(
            f"tensor {quote(main.name)} has {outputs} outputs; {scheme.bits} bits of each are to "
            "fill whole words of 32"
        )
    group = scheme.group or inputs
    stored = {}
    for part, shape in method.shapes(scheme.bits, group, outputs, inputs).items():
        tensor = tensors.get(f"{stem}.{part}")
        if part == "g_idx" and (tensor is None or tensor.shape == (0,)) and not scheme.act_order:
            continue
        _check(f"{stem}.{part}", tensor, shape, _DTYPES[part])
        assert tensor is not None
        stored[part] = tensor
    format = integers.name(scheme.bits, block_for(group, inputs))
    zero_bias = _zero_bias(tensors.get(f"{stem}.bias"))
    shape = (outputs, inputs)
    return GroupedTensor(f"{stem}.weight", format, shape, scheme, stored, zero_bias, main.pages)


def _check(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    if tensor is None:
        raise InvalidCheckpoint(f"the tensor {quote(name)} is missing; its shape would be {shape}")
    if tensor.shape != shape:
        raise InvalidCheckpoint(
            f"tensor {quote(name)} has shape {tensor.shape}; quantization_config and the other "
            f"tensors ask for {shape}"
        )
    if tensor.format not in dtypes:
        raise UnsupportedModel(
            f"tensor {quote(name)} has format {tensor.format}; it must be {' or '.join(dtypes)}"
        )


def _zero_bias(bias: Tensor | None) -> str | None:
    if bias is None or bias.format not in FORMATS or bias.to_float32().any():
        return None
    return bias.name


def zero_biases(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of biases that change nothing."""
    found = (t.zero_bias for t in tensors.values() if isinstance(t, GroupedTensor))
    return {name for name in found if name is not None}
