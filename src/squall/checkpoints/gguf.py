"""GGUF files, whole or in parts: mapped read-only, headers checked; opening touches no weight."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from squall.checkpoints.base import Buffer, Checkpoint, map_file, mapped
from squall.checkpoints.gguf_header import MAX_HEADER_BYTES, MAX_TENSORS, PartHeader, parse_header
from squall.errors import InvalidCheckpoint
from squall.files import quote

MAX_PARTS = 512
_PART_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    buffer: Buffer
    header: PartHeader


def open_gguf(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF file, with all parts if it is split; any part may be named."""
    found = read_gguf(path)
    for tensor in found.tensors.values():
        tensor.check_format()
    return found


def read_gguf(path: str | os.PathLike[str]) -> Checkpoint:
    """The same, also with number formats that Squall cannot run."""
    parts = _open_parts(Path(path))
    entries = ((part, entry) for part in parts for entry in part.header.entries)
    tensors = {e.name: mapped(part.buffer, e, part.header.data_start) for part, e in entries}
    return Checkpoint(
        Path(path),
        MappingProxyType(parts[0].header.metadata),
        MappingProxyType(tensors),
        sum(len(part.buffer) for part in parts),
        parts[0].header.version,
        tuple(part.path for part in parts),
    )


def _open_parts(path: Path) -> list[_Part]:
    opened = _open_part(path, MAX_HEADER_BYTES)
    count = _split_field(opened, "split.count", 1)
    if count == 1:
        return [opened]
    own, paths = _part_paths(opened, count)
    parts, budget = [], MAX_HEADER_BYTES
    for number, part_path in enumerate(paths):
        part = opened if number == own else _open_part(part_path, budget)
        budget -= part.header.data_start
        _check_part(part, number, count)
        parts.append(part)
    _check_tensors(parts)
    return parts


def _open_part(path: Path, limit: int) -> _Part:
    buffer = map_file(path)
    return _Part(path, buffer, parse_header(buffer, path.name, limit))


def _split_field(part: _Part, key: str, default: int | None = None) -> int:
    value = part.header.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise InvalidCheckpoint(
            f"{quote(part.path.name)}: {key} must be a number >= 0 in every part of a split file"
        )
    return value


def _part_paths(opened: _Part, count: int) -> tuple[int, list[Path]]:
    """The index of the opened part and the paths of all."""
    name = quote(opened.path.name)
    if not 1 <= count <= MAX_PARTS:
        raise InvalidCheckpoint(
            f"{name}: split.count is {count}; 1 to {MAX_PARTS} parts are allowed"
        )
    own = _split_field(opened, "split.no")
    match = _PART_NAME.fullmatch(opened.path.name)
    if match is None or (int(match[2]) - 1, int(match[3])) != (own, count):
        raise InvalidCheckpoint(
            f"{name} is part {own + 1} of {count} of a split file, so its name must end in "
            f"'-{own + 1:05}-of-{count:05}.gguf'; give it back its name"
        )
    names = (f"{match[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))
    return own, [opened.path.with_name(part) for part in names]


def _check_part(part: _Part, number: int, count: int) -> None:
    own, of = _split_field(part, "split.no"), _split_field(part, "split.count")
    if (own, of) != (number, count):
        raise InvalidCheckpoint(
            f"{quote(part.path.name)} is part {own + 1} of {of} by its metadata, "
            f"part {number + 1} of {count} by its name"
        )


def _check_tensors(parts: list[_Part]) -> None:
    names = [entry.name for part in parts for entry in part.header.entries]
    if len(names) > MAX_TENSORS:
        raise InvalidCheckpoint(f"the parts hold {len(names)} tensors; the limit is {MAX_TENSORS}")
    double, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise InvalidCheckpoint(f"tensor {quote(double)} is in more than one part")
    expected = _split_field(parts[0], "split.tensors.count", len(names))
    if expected != len(names):
        raise InvalidCheckpoint(
            f"{quote(parts[0].path.name)} and its other parts hold {len(names)} tensors, "
            f"not {expected}; use parts of one model"
        )
