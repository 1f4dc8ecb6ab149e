"""PyTorch checkpoints (`.bin`, `.pt`, `.pth`): tensors as views of the mapped file.

Both layouts are read: the ZIP archive, and the row of pickles from before it.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import ITEM_BYTES, Buffer, ByteTensor, Entry, Tensor, map_file, mapped
from squall.checkpoints.gguf_header import MAX_TENSORS
from squall.checkpoints.unpickle import MAX_BYTES, View, check_magic, unpickle
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote

MAX_ENTRIES = MAX_TENSORS + 1024
MAX_DIRECTORY_BYTES = 16 << 20
_ZIP = b"PK\x03\x04"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_LOCAL = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


def open_pickle(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a file that `torch.save` wrote; nothing in it is ever executed.

    Tensors may share bytes. One that is not contiguous is copied; the copies together may not
    be larger than the file.
    """
    file = Path(path)
    buffer = map_file(file, "give a .bin, .pt or .pth file")
    read = _read_archive if buffer[:4] == _ZIP else _read_row
    value, spans = read(file, buffer)
    tensors: dict[str, Tensor] = {}
    copied = 0
    for name, view in _views(value, file.name).items():
        tensor = _tensor(name, view, spans, buffer)
        copied += tensor.nbytes if tensor.pages is None else 0
        if copied > len(buffer):
            raise InvalidCheckpoint(
                f"{quote(file.name)}: tensors that are not contiguous are larger than the file"
            )
        tensors[name] = tensor
    return tensors


def _read_archive(file: Path, buffer: Buffer) -> tuple[Any, dict[str, range]]:
    entries = _entries(file, buffer)
    roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
    roots = [root for root in roots if root.count("/") == 1]
    if len(roots) != 1:
        raise InvalidCheckpoint(f"{quote(file.name)} is a ZIP file without one data.pkl")
    order = entries.get(roots[0] + "byteorder")
    if order and buffer[order.start : order.stop] != b"little":
        raise UnsupportedModel(f"{quote(file.name)} has big-endian numbers; save it again")
    pickle = entries[roots[0] + "data.pkl"]
    if len(pickle) > MAX_BYTES:
        raise InvalidCheckpoint(f"{quote(file.name)}: its pickle has over {MAX_BYTES} bytes")
    value, _ = unpickle(buffer, pickle.start, pickle.stop, file.name)
    folder = roots[0] + "data/"
    data = {name[len(folder) :]: span for name, span in entries.items() if name.startswith(folder)}
    return value, data


class _BoundedFile(io.FileIO):
    """A file that is not read in large parts, such as a huge directory of a ZIP file."""

    def read(self, size: int | None = -1) -> bytes:
        wanted = MAX_DIRECTORY_BYTES if size is None or size < 0 else size
        if wanted > MAX_DIRECTORY_BYTES:
            raise ValueError(f"its directory has over {MAX_DIRECTORY_BYTES} bytes")
        return super().read(wanted) or b""


def _entries(file: Path, buffer: Buffer) -> dict[str, range]:
    """Where the entries of a ZIP file lie, by name; names are keys here and never paths."""
    try:
        with _BoundedFile(file) as opened, zipfile.ZipFile(opened) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise InvalidCheckpoint(f"{quote(file.name)} is no whole ZIP file: {error}") from None
    found: dict[str, range] = {}
    for info in infos:
        name = info.filename
        if name in found or len(found) >= MAX_ENTRIES:
            raise InvalidCheckpoint(
                f"{quote(file.name)} has entry {quote(name)} twice, or over {MAX_ENTRIES} entries"
            )
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UnsupportedModel(
                f"{quote(file.name)}: entry {quote(name)} is compressed or encrypted; PyTorch's "
                "own files are not"
            )
        found[name] = _place(file, buffer, info)
    return found


def _place(file: Path, buffer: Buffer, info: zipfile.ZipInfo) -> range:
    at = info.header_offset
    if 0 <= at <= len(buffer) - _LOCAL.size:
        signature, name_bytes, extra_bytes = _LOCAL.unpack_from(buffer, at)
        start = at + _LOCAL.size + name_bytes + extra_bytes
        if signature == _ZIP and start + info.file_size <= len(buffer):
            return range(start, start + info.file_size)
    raise InvalidCheckpoint(
        f"{quote(file.name)}: entry {quote(info.filename)} is outside of the file; "
        "it may be cut off"
    )


def _read_row(file: Path, buffer: Buffer) -> tuple[Any, dict[str, range]]:
    """Magic number, protocol, machine, value, keys of storages; then their sizes and numbers."""
    values: list[Any] = []
    position = 0
    for _ in range(5):
        value, position = unpickle(buffer, position, len(buffer), file.name)
        if not values:
            check_magic(value, file.name)
        values.append(value)
    machine, value, keys = values[2:]
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UnsupportedModel(f"{quote(file.name)} has big-endian numbers; save it again")
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise InvalidCheckpoint(f"{quote(file.name)}: the keys of storages must be strings")
    sizes = {view.storage.key: ITEM_BYTES[view.storage.format] for view in _all_views(value)}
    spans: dict[str, range] = {}
    for key in keys:
        if key not in sizes or position + 8 > len(buffer):
            raise InvalidCheckpoint(
                f"{quote(file.name)}: storage {quote(key)} is unused or cut off"
            )
        size = int.from_bytes(buffer[position : position + 8], "little") * sizes[key]
        if position + 8 + size > len(buffer):
            raise InvalidCheckpoint(f"{quote(file.name)} is cut off in storage {quote(key)}")
        spans[key] = range(position + 8, position + 8 + size)
        position += 8 + size
    return value, spans


def _all_views(value: Any) -> list[View]:
    """The tensors of a dictionary and of the dictionaries in it, no deeper."""
    outer = value if isinstance(value, dict) else {}
    inner = [item for item in outer.values() if isinstance(item, dict)]
    return [v for d in (outer, *inner) for v in d.values() if isinstance(v, View)]


def _views(value: Any, source: str) -> dict[str, View]:
    """The tensors by name, from a dictionary or from the dictionary of weights in it."""
    for wrapper in _WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = value[wrapper]
            break
    found = {k: v for k, v in value.items() if isinstance(v, View)} if type(value) is dict else {}
    if not 1 <= len(found) <= MAX_TENSORS:
        raise InvalidCheckpoint(
            f"{quote(source)} holds no dictionary of 1 to {MAX_TENSORS} tensors"
        )
    return found


def _tensor(name: str, view: View, spans: Mapping[str, range], buffer: Buffer) -> Tensor:
    size = ITEM_BYTES[view.storage.format]
    span = spans.get(view.storage.key)
    last = view.offset + sum(
        (n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True)
    )
    count = math.prod(view.shape)
    if count == 0 or span is None or last >= min(view.storage.size, len(span) // size):
        raise InvalidCheckpoint(
            f"tensor {quote(name)} of shape {view.shape} is empty, or not within its storage"
        )
    shape = view.shape or (1,)
    start = span.start + view.offset * size
    if _is_contiguous(view):
        return mapped(buffer, Entry(name, view.storage.format, shape, count * size, start))
    if count > view.storage.size:
        raise InvalidCheckpoint(f"tensor {quote(name)} repeats its numbers; save it contiguous")
    data = _gather(np.frombuffer(buffer, np.uint8, (last - view.offset + 1) * size, start), view)
    return ByteTensor(name, view.storage.format, shape, data)


def _is_contiguous(view: View) -> bool:
    expected = 1
    for n, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def _gather(data: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    size = ITEM_BYTES[view.storage.format]
    strides = (*(stride * size for stride in view.strides), 1)
    strided = np.lib.stride_tricks.as_strided(data, (*view.shape, size), strides, writeable=False)
    copy = np.ascontiguousarray(strided).reshape(-1)
    copy.setflags(write=False)
    return copy
