"""What a checkpoint is, whatever file it came from: metadata, and tensors viewing mapped bytes."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from squall.errors import ModelNotFound, UnsupportedModel
from squall.files import quote
from squall.quant import FORMATS

Buffer = mmap.mmap | bytes
Scalar = int | float | bool
Field = Scalar | str | list[Any] | dict[str, Any] | NDArray[Any] | None
Kind = Literal["gguf", "folder", "uqff"]
# Bytes an element, by the names of what files may hold.
ITEM_BYTES = {
    "f64": 8, "f32": 4, "f16": 2, "bf16": 2, "f8_e4m3": 1, "f8_e5m2": 1, "i64": 8, "i32": 4,
    "i16": 2, "i8": 1, "u64": 8, "u32": 4, "u16": 2, "u8": 1, "bool": 1,
}  # fmt: skip


def map_file(path: Path, advice: str = "give the path of a .gguf file") -> Buffer:
    """Map a regular file read-only; raises ModelNotFound with `advice` for anything else."""
    try:
        kind = os.stat(path).st_mode
        # Before opening: to open a pipe blocks.
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "not a regular file"
            raise ModelNotFound(f"{str(path)!r} is {what}; {advice}")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFound(f"there is no file {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"cannot read {str(path)!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file's table, and where its bytes begin; 0 bytes if the format is unknown."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    start: int


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Bytes `start:stop` of a mapped file, for advice; where the system takes none, nothing."""

    file: mmap.mmap
    start: int
    stop: int

    def fetch(self) -> None:
        """Begin to read them from the disk."""
        self._advise("MADV_WILLNEED")

    def release(self) -> None:
        """Take them off this process's memory; who reads them again gets them again."""
        self._advise("MADV_DONTNEED")

    def _advise(self, name: str) -> None:
        advice = getattr(mmap, name, None)
        if advice is not None:
            first = self.start // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):
                self.file.madvise(advice, first, self.stop - first)


class Tensor(ABC):
    """A tensor of a checkpoint: row-major, the last axis contiguous, read when it is asked for.

    factor: what the values are multiplied by. pages: where its bytes lie in a file, if they do.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    factor: float = 1.0
    pages: Pages | None = None

    @property
    def data(self) -> NDArray[np.uint8]:
        """The bytes of all rows."""
        return self.row_data(0, self.rows)

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix; a vector is one row."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Elements of the last axis."""
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.rows * FORMATS[self.format].row_bytes(self.cols)

    @property
    def order(self) -> NDArray[np.uint32] | None:
        """The columns as `row_data` has them; None: as they are."""
        return None

    @abstractmethod
    def row_data(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows start:stop, in blocks of `format`."""

    def check_format(self) -> None:
        """Raise UnsupportedModel when Squall cannot compute with the tensor's format."""
        if self.format not in FORMATS:
            raise UnsupportedModel(
                f"tensor {quote(self.name)} has format {self.format}, which Squall cannot "
                f"compute with; known: {', '.join(FORMATS)}"
            )

    def to_float32(self) -> NDArray[np.float32]:
        """The values as float32, in `shape`."""
        values = FORMATS[self.format].dequantize(self.data).reshape(self.shape)
        return values if self.factor == 1.0 else values * np.float32(self.factor)


@dataclass(frozen=True, eq=False)
class ByteTensor(Tensor):
    """A tensor whose bytes are there as they are, read-only, perhaps in a mapped file."""

    name: str
    format: str
    shape: tuple[int, ...]
    view: NDArray[np.uint8]
    pages: Pages | None = None
    factor: float = 1.0

    @property
    def data(self) -> NDArray[np.uint8]:
        return self.view

    @property
    def nbytes(self) -> int:
        return self.view.size

    def row_data(self, start: int, stop: int) -> NDArray[np.uint8]:
        row_bytes = FORMATS[self.format].row_bytes(self.cols)
        return self.view[start * row_bytes : stop * row_bytes]


def mapped(buffer: Buffer, entry: Entry, base: int = 0) -> Tensor:
    """The tensor of an entry, whose bytes begin at `base + entry.start`, as a view of the file."""
    start, stop = base + entry.start, base + entry.start + entry.nbytes
    pages = Pages(buffer, start, stop) if isinstance(buffer, mmap.mmap) else None
    view = np.frombuffer(buffer, np.uint8)[start:stop]
    return ByteTensor(entry.name, entry.format, entry.shape, view, pages)


@dataclass(frozen=True, eq=False)
class Deferred(Tensor):
    """A tensor whose bytes are made, from those of a file, whenever they are asked for."""

    name: str
    format: str
    shape: tuple[int, ...]
    make: Callable[[], NDArray[np.uint8]]

    def row_data(self, start: int, stop: int) -> NDArray[np.uint8]:
        row_bytes = FORMATS[self.format].row_bytes(self.cols)
        return self.make()[start * row_bytes : stop * row_bytes]


def transposed(tensor: Tensor) -> Tensor:
    """A matrix with its columns as rows."""

    def made() -> NDArray[np.uint8]:
        return np.ascontiguousarray(tensor.to_float32().T).reshape(-1).view(np.uint8)

    return Deferred(tensor.name, "f32", tensor.shape[::-1], made)


def tap_by_tap(tensor: Tensor, taps: int) -> Tensor:
    """A convolution's weight, [rows, channels, taps], as rows with columns tap by tap."""

    def made() -> NDArray[np.uint8]:
        values = tensor.to_float32().reshape(tensor.shape[0], -1, taps)
        return np.ascontiguousarray(values.swapaxes(1, 2)).reshape(-1).view(np.uint8)

    return Deferred(tensor.name, "f32", (tensor.shape[0], math.prod(tensor.shape[1:])), made)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An open checkpoint; reading a tensor's `data` is what brings its pages in.

    gguf: `path` is a file, `metadata` its fields. folder: `path` is one, `metadata` what its
    config.json says; other files in it (tokenizer, generation defaults) are for who needs them.
    quantization: how the weights of a folder are quantized, for people; "": they are not.
    uqff: the same, with weights that are known by number (see `checkpoints.uqff`).
    beside: other files of the model, by the `source` that slices name.
    """

    path: Path
    metadata: Mapping[str, Field]
    tensors: Mapping[str, Tensor]
    size_bytes: int
    version: int = 0
    parts: tuple[Path, ...] = ()
    kind: Kind = "gguf"
    quantization: str = ""
    beside: Mapping[str, Checkpoint] = field(default_factory=dict)
