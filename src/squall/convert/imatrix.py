"""Importance matrices of ggml's tools: mean squares of what each column of a linear is given.

The older files are counts, names and floats one after another; the newer ones are GGUF.
"""

from __future__ import annotations

from pathlib import Path
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints import open_gguf
from squall.checkpoints.base import Buffer, map_file
from squall.checkpoints.gguf_header import Cursor
from squall.convert.matrices import Importance
from squall.errors import InvalidCheckpoint
from squall.files import quote

MAX_ENTRIES = 1 << 16
MAX_NAME = 256
_U32, _I32 = Struct("<I"), Struct("<i")
_SUMS, _COUNTS, _WEIGHT = ".in_sum2", ".counts", ".weight"


def read_imatrix(path: Path) -> Importance:
    """Read either kind; every number is checked to be finite and not negative."""
    data = map_file(path, "give an imatrix file")
    found = _read_gguf(path) if data[:4] == b"GGUF" else _read_old(data, path.name)
    for name, values in found.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise InvalidCheckpoint(
                f"{quote(path.name)}: {quote(name)} has a number that is negative or not finite"
            )
    if not found:
        raise InvalidCheckpoint(f"{quote(path.name)} has no entries; it is no imatrix")
    return found


def _read_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    tensors = open_gguf(path).tensors
    found: dict[str, NDArray[np.float32]] = {}
    for name, sums in tensors.items():
        if not name.endswith(_SUMS):
            continue
        stem = name.removesuffix(_SUMS)
        counts = tensors.get(stem + _COUNTS)
        experts = sums.rows
        if counts is None or counts.rows * counts.cols != experts:
            raise InvalidCheckpoint(f"{quote(path.name)}: {quote(stem)} has no counts that fit")
        each = np.maximum(counts.to_float32().reshape(experts, 1), np.float32(1))
        mean = sums.to_float32().reshape(experts, -1) / each
        found[stem.removesuffix(_WEIGHT)] = mean.astype(np.float32)
    return found


def _read_old(buffer: Buffer, source: str) -> dict[str, NDArray[np.float32]]:
    cursor = Cursor(buffer, source, len(buffer))
    count = cursor.integer(_U32, "the number of entries")
    if not 1 <= count <= MAX_ENTRIES:
        raise InvalidCheckpoint(f"{quote(source)} has {count} entries; it is no imatrix")
    found: dict[str, NDArray[np.float32]] = {}
    for _ in range(count):
        length = cursor.integer(_U32, "the length of a name")
        if not 1 <= length <= MAX_NAME:
            raise cursor.fault(f"a name has {length} bytes; 1 to {MAX_NAME} are allowed")
        start = cursor.take(length, "a name")
        name = buffer[start : start + length].decode("utf-8", "replace")
        calls = max(cursor.integer(_I32, "the number of calls"), 1)
        size = 4 * cursor.integer(_U32, "the number of values")
        start = cursor.take(size, "the values")
        values = np.frombuffer(buffer[start : start + size], np.float32) / np.float32(calls)
        found[name.removesuffix(_WEIGHT)] = values.reshape(1, -1)
    return found
