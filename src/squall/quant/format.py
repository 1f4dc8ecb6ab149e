"""What a number format is: a block of bytes that stands for a block of float32 values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall.errors import InvalidCheckpoint, InvalidRequest

Decode: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
Encode: TypeAlias = Callable[[NDArray[np.float32]], NDArray[Any]]

# Values decoded at a time, so that the intermediate arrays stay in the cache.
_CHUNK_VALUES = 1 << 16


@dataclass(frozen=True, slots=True)
class Format:
    """One number format. `layout` is the block's bytes, field by field, little-endian."""

    name: str
    ggml_id: int | None  # in GGUF files, if ggml has the format
    block: int  # values a block
    layout: np.dtype[Any]
    decode: Decode  # layout [blocks] -> float32 [blocks, block]
    encode: Encode | None = None  # float32 [values, 1] -> layout [values]; None: the native core

    @property
    def block_bytes(self) -> int:
        return self.layout.itemsize

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` values; blocks never span rows."""
        if cols < 0 or cols % self.block:
            raise InvalidCheckpoint(
                f"a {self.name} row holds whole blocks of {self.block} values, not {cols} values"
            )
        return cols // self.block * self.block_bytes

    def dequantize(self, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The values of whole blocks: uint8 [bytes] -> new float32 [values]."""
        if len(data) % self.block_bytes:
            raise InvalidCheckpoint(
                f"{self.name} data comes in blocks of {self.block_bytes} bytes, "
                f"not {len(data)} bytes: the tensor is truncated or its type is wrong"
            )
        blocks = np.ascontiguousarray(data).view(self.layout)
        values = np.empty((len(blocks), self.block), np.float32)
        step = _CHUNK_VALUES // self.block
        # A broken file's inf and NaN scales pass through; they are no reason for a warning here.
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(blocks), step):
                values[start : start + step] = self.decode(blocks[start : start + step])
        return values.reshape(-1)

    def quantize(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The nearest blocks to `values`, float32 [values], whole blocks -> uint8 [bytes]."""
        if len(values) % self.block:
            raise InvalidRequest(
                f"{self.name} takes whole blocks of {self.block} values, not {len(values)} values"
            )
        blocks = np.ascontiguousarray(values, np.float32).reshape(-1, self.block)
        if self.encode is None:
            return self._search(blocks)
        with np.errstate(over="ignore", invalid="ignore"):
            return self.encode(blocks).view(np.uint8).reshape(-1)

    def _search(self, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
        try:
            return _native.quantize(self.name, blocks)[0]
        except ValueError as error:
            raise InvalidRequest(f"cannot quantize to {self.name}: {error}") from None
