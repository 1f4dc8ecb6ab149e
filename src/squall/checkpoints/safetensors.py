"""Safetensors files: a JSON table of tensors, then their bytes. All of the table is checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squall.checkpoints.base import ITEM_BYTES, Buffer, Entry, Tensor, map_file, mapped
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import parse_json, quote

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 16
MAX_NAME_CHARS = 256
MAX_DIMS = 8
FORMATS = {name.upper(): name for name in ITEM_BYTES}
_METADATA = "__metadata__"
_LFS = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Part:
    path: Path
    buffer: Buffer
    entries: tuple[Entry, ...]

    def tensors(self) -> Iterable[Tensor]:
        return (mapped(self.buffer, entry) for entry in self.entries)


def open_part(path: Path) -> Part:
    buffer = map_file(path, "name the folder of the model")
    return Part(path, buffer, parse_header(buffer, path.name))


def parse_header(buffer: Buffer, source: str) -> tuple[Entry, ...]:
    """The checked table of a file, in the order of its bytes; `source` names it in errors."""
    size = _header_bytes(buffer, source)
    table = parse_json(buffer[8 : 8 + size], source, unique=True)
    metadata = table.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidCheckpoint(f"{quote(source)}: {_METADATA} must hold texts")
    if len(table) > MAX_TENSORS:
        raise InvalidCheckpoint(
            f"{quote(source)} has {len(table)} tensors; the limit is {MAX_TENSORS}"
        )
    entries = sorted(
        (_entry(name, item, 8 + size, source) for name, item in table.items()),
        key=lambda entry: (entry.start, entry.nbytes),
    )
    _check_places(entries, 8 + size, len(buffer), source)
    return tuple(entries)


def _header_bytes(buffer: Buffer, source: str) -> int:
    if buffer[: len(_LFS)] == _LFS:
        raise InvalidCheckpoint(
            f"{quote(source)} is a Git LFS pointer; fetch the file with `git lfs pull`"
        )
    size = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or not 2 <= size <= MAX_HEADER_BYTES or buffer[8:9] != b"{":
        raise InvalidCheckpoint(
            f"{quote(source)} is not a safetensors file: it must begin with the length of its "
            f"header, 2 to {MAX_HEADER_BYTES}, and a '{{'"
        )
    if 8 + size > len(buffer):
        raise InvalidCheckpoint(
            f"{quote(source)} is cut off: its header has {size} bytes, the file {len(buffer)}"
        )
    return size


def _entry(name: str, item: Any, data_start: int, source: str) -> Entry:
    where = f"{quote(source)}: tensor {quote(name)}"
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise InvalidCheckpoint(f"{where} has a name of {len(name)} characters; 1 to 256 may be")
    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidCheckpoint(f"{where} must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FORMATS:
        raise UnsupportedModel(
            f"{where} has dtype {quote(str(dtype))}; known: {', '.join(FORMATS)}"
        )
    if not _are_counts(shape) or len(shape) > MAX_DIMS or math.prod(shape) >= 1 << 60:
        raise InvalidCheckpoint(
            f"{where} has shape {repr(shape)[:99]}; up to {MAX_DIMS} sizes >= 0 may be"
        )
    if not _are_counts(offsets) or len(offsets) != 2:
        raise InvalidCheckpoint(f"{where} has data_offsets {repr(offsets)[:99]}, not two numbers")
    format = FORMATS[dtype]
    nbytes = math.prod(shape) * ITEM_BYTES[format]
    if offsets[1] - offsets[0] != nbytes:
        raise InvalidCheckpoint(
            f"{where} has {offsets[1] - offsets[0]} bytes; {dtype} of {shape} takes {nbytes}"
        )
    return Entry(name, format, tuple(shape), nbytes, data_start + offsets[0])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 60 for v in values)


def _check_places(entries: list[Entry], start: int, size: int, source: str) -> None:
    """The format allows neither overlaps nor bytes that belong to no tensor."""
    for before, after in itertools.pairwise(entries):
        if before.start + before.nbytes > after.start:
            raise InvalidCheckpoint(
                f"{quote(source)}: tensors {quote(before.name)} and {quote(after.name)} overlap"
            )
    used = start + sum(entry.nbytes for entry in entries)
    end = entries[-1].start + entries[-1].nbytes if entries else start
    if end > size:
        raise InvalidCheckpoint(
            f"{quote(source)} is cut off: its tensors end at byte {end}, the file has {size}"
        )
    if used != size:
        raise InvalidCheckpoint(f"{quote(source)} has {size - used} bytes that no tensor uses")
