"""UQFF 0.1: the quantized linears of a model, by number, as blobs in one safetensors file.

What is not quantized lies beside it in residual.safetensors, and so do config.json and the files of
the tokenizer. A blob is a version, a kind and the fields of the kind, little-endian and packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import ITEM_BYTES, ByteTensor, Checkpoint, Deferred, Tensor
from squall.checkpoints.safetensors import open_part
from squall.checkpoints.uqff_hqq import Hqq
from squall.errors import InvalidCheckpoint, ModelNotFound, UnsupportedModel
from squall.files import quote, read_json
from squall.quant import by_ggml_id

SUFFIX = ".uqff"
RESIDUAL = "residual.safetensors"
MAJOR = 0
VERSION = 0x000102
MAX_DIMS = 4
# By their numbers in the file.
DTYPES = ("u8", "u32", "i32", "i64", "f16", "bf16", "f32", "f64", "i16", "f8_e4m3")
GGML, PLAIN, HQQ, FP8 = range(4)


def weight_name(index: int) -> str:
    return f"uqff.{index}.weight"


def bias_name(index: int) -> str:
    return f"uqff.{index}.bias"


def open_uqff(path: Path) -> Checkpoint:
    """Open a UQFF file and what must lie beside it; no weight is read."""
    part = open_part(path)
    blobs = {tensor.name: tensor for tensor in part.tensors()}
    if not blobs:
        raise InvalidCheckpoint(f"{quote(path.name)} has no linears")
    linears: list[Tensor] = []
    for index in range(len(blobs)):
        if str(index) not in blobs:
            raise InvalidCheckpoint(
                f"{quote(path.name)} has {len(blobs)} linears, and none of them is {index}; "
                "they are numbered from 0 without gaps"
            )
        linears += _linear(blobs[str(index)], index, path.name)
    residual, config = path.with_name(RESIDUAL), read_json(path.with_name("config.json"))
    if config is None or not residual.is_file():
        raise ModelNotFound(f"{str(path)!r} needs config.json and {RESIDUAL} beside it")
    tensors = {tensor.name: tensor for tensor in (*open_part(residual).tensors(), *linears)}
    return Checkpoint(
        path.parent,
        MappingProxyType(config),
        MappingProxyType(tensors),
        path.stat().st_size + residual.stat().st_size,
        parts=(path, residual),
        kind="uqff",
    )


class Blob:
    """Reads one blob from its start; all that it returns lies within the blob."""

    def __init__(self, tensor: Tensor, index: int, source: str) -> None:
        self.index = index
        self._where = f"{quote(source)}: linear {index}"
        if tensor.format != "u8" or len(tensor.shape) != 1:
            raise self.fault(f"is {tensor.format} of {tensor.shape}, not a row of bytes")
        self._data = tensor.data
        self.pages = tensor.pages
        self._at = 0

    def fault(self, problem: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self._where} {problem}")

    def take(self, size: int, what: str) -> NDArray[np.uint8]:
        if size > len(self._data) - self._at:
            raise self.fault(
                f"is cut off: its {what} takes {size} bytes, {len(self._data) - self._at} are left"
            )
        self._at += size
        return self._data[self._at - size : self._at]

    def u8(self, what: str) -> int:
        return int(self.take(1, what)[0])

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what).tobytes(), "little")

    def f32(self, what: str) -> float:
        return float(self.take(4, what).view("<f4")[0])

    def flag(self, what: str) -> bool:
        value = self.u8(what)
        if value > 1:
            raise self.fault(f"says {value} of its {what}; 0 or 1 may be")
        return value == 1

    def dims(self, what: str) -> tuple[int, ...]:
        count = self.u32(what)
        if not 1 <= count <= MAX_DIMS:
            raise self.fault(f"has {count} dimensions of its {what}; 1 to {MAX_DIMS} may be")
        sizes = tuple(self.u32(what) for _ in range(count))
        if 0 in sizes or math.prod(sizes) >= 1 << 48:
            raise self.fault(f"has {what} of the shape {sizes}")
        return sizes

    def matrix(self, what: str) -> tuple[int, ...]:
        sizes = self.dims(what)
        if len(sizes) != 2:
            raise self.fault(f"has {what} of the shape {sizes}; a linear is [out, in]")
        return sizes

    def tensor(self, name: str, what: str) -> Tensor:
        """A TENSOR of the format: its bytes, dtype and shape come first."""
        nbytes, dtype = self.u32(what), self.u32(what)
        if dtype >= len(DTYPES):
            known = ", ".join(f"{id} {name}" for id, name in enumerate(DTYPES))
            raise UnsupportedModel(f"{self._where} has {what} of dtype {dtype}; known: {known}")
        format, shape = DTYPES[dtype], self.dims(what)
        if math.prod(shape) * ITEM_BYTES[format] != nbytes:
            raise self.fault(f"has {what} of {nbytes} bytes; {format} of {shape} takes others")
        return ByteTensor(name, format, shape, self.take(nbytes, what), self.pages)

    def floats(self, tensor: Tensor) -> Tensor:
        """The tensor, if it is of floats that linears can have."""
        if tensor.format not in ("f32", "f16", "bf16"):
            raise UnsupportedModel(
                f"{self._where} has floats as {tensor.format}; known: f32, f16, bf16"
            )
        return tensor

    def end(self) -> None:
        if self._at != len(self._data):
            raise self.fault(f"has {len(self._data) - self._at} bytes too many")


def _linear(tensor: Tensor, index: int, source: str) -> list[Tensor]:
    """The weight, and the bias if there is one."""
    blob = Blob(tensor, index, source)
    version = blob.u32("version")
    major, minor, patch = version >> 16, version >> 8 & 255, version & 255
    if major != MAJOR:
        raise UnsupportedModel(
            f"{quote(source)} is UQFF {major}.{minor}.{patch}; Squall reads {MAJOR}.x"
        )
    kind = blob.u8("kind")
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"{quote(source)}: linear {index} is of kind {kind}; known: 0 GGUF, 1 unquantized, "
            "2 HQQ, 3 FP8"
        )
    weight, has_bias = _KINDS[kind](blob)
    bias = blob.floats(blob.tensor(bias_name(index), "bias")) if has_bias else None
    if bias is not None and bias.shape != (weight.rows,):
        raise blob.fault(f"has a bias of {bias.shape}; its weight has {weight.rows} rows")
    blob.end()
    return [weight] if bias is None else [weight, bias]


def _ggml(blob: Blob) -> tuple[Tensor, bool]:
    nbytes = blob.u32("length of the data")
    has_bias = blob.flag("bias")
    format, shape = by_ggml_id(blob.u32("ggml type")), blob.matrix("weight")
    if format.row_bytes(shape[1]) * shape[0] != nbytes:
        raise blob.fault(f"has {nbytes} bytes of data; {format.name} of {shape} takes others")
    data = blob.take(nbytes, "data")
    return ByteTensor(weight_name(blob.index), format.name, shape, data, blob.pages), has_bias


def _plain(blob: Blob) -> tuple[Tensor, bool]:
    has_bias = blob.flag("bias")
    weight = blob.floats(blob.tensor(weight_name(blob.index), "weight"))
    if len(weight.shape) != 2:
        raise blob.fault(f"has a weight of the shape {weight.shape}; a linear is [out, in]")
    return weight, has_bias


def _fp8(blob: Blob) -> tuple[Tensor, bool]:
    """The factors of the activations, and to quantize with, are not needed to compute."""
    has_bias = blob.flag("bias")
    weight = blob.tensor(weight_name(blob.index), "weight")
    factor, _, _ = (blob.f32("factors") for _ in range(3))
    dtype = blob.u32("dtype")
    if weight.format != "f8_e4m3" or len(weight.shape) != 2 or dtype >= len(DTYPES):
        raise blob.fault(f"has FP8 as {weight.format} of {weight.shape}, for dtype {dtype}")
    if not (math.isfinite(factor) and factor > 0):
        raise blob.fault(f"has the factor {factor}")
    made = ByteTensor(weight.name, weight.format, weight.shape, weight.data, blob.pages, factor)
    return made, has_bias


def _hqq(blob: Blob) -> tuple[Tensor, bool]:
    has_bias = blob.flag("bias")
    codes, scales, zeros = (blob.tensor("", what) for what in ("codes", "scales", "zeros"))
    shape, bits = blob.matrix("weight"), blob.u8("bits")
    group, axis = blob.u32("group"), blob.u8("axis")
    blob.take(6, "settings")  # of the search for the zero points: they change nothing here
    blob.floats(scales), blob.floats(zeros)
    try:
        found = Hqq(codes, scales, zeros, shape, bits, group, axis)
    except ValueError as error:
        raise blob.fault(f"is HQQ that does not fit together: {error}") from None
    return Deferred(weight_name(blob.index), found.format, shape, found.blocks), has_bias


_KINDS: dict[int, Callable[[Blob], tuple[Tensor, bool]]]
_KINDS = {GGML: _ggml, PLAIN: _plain, HQQ: _hqq, FP8: _fp8}
