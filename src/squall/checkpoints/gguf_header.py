"""The header of one GGUF file. Nothing in it is used before it was checked against the file.

Two passes: the first walks and checks everything and keeps only positions of strings and arrays;
the second decodes them. So a malformed file costs no more than a walk, wherever the fault is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Buffer, Entry, Field, Scalar
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.quant import GGML_FORMATS, UNSUPPORTED

# At least twice what the largest known models need (a vocabulary of 262 k with 515 k merges).
MAX_HEADER_BYTES = 32 << 20
MAX_FIELDS = 1 << 14
MAX_TENSORS = 1 << 15
MAX_STRINGS = 1 << 21
MAX_KEY_BYTES = 1024
MAX_NAME_BYTES = 256
MAX_ALIGNMENT = 1 << 16
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
VERSIONS = (2, 3)

_U32, _U64 = Struct("<I"), Struct("<Q")
# What follows a tensor's name, by its number of dimensions: shape, type, offset.
_PLACES = {dims: Struct(f"<{dims}QIQ") for dims in range(1, MAX_DIMS + 1)}
_BOOL, _STRING, _ARRAY = 7, 8, 9
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), _BOOL: np.dtype("?"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
# The least bytes of a field (key length, key, type, value) and of a tensor entry.
_FIELD_BYTES = 8 + 1 + 4 + 1
_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

_HINTS = {
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file with `git lfs pull`",
    b"<": "it looks like a web page; download the file again",
    b"PK\x03\x04": "it is a ZIP or PyTorch file; give a .gguf file",
    b"FUGG": "its bytes are in reverse order",
    b"lmgg": "it is a GGML file from before GGUF",
    b"fmgg": "it is a GGMF file from before GGUF",
    b"tjgg": "it is a GGJT file from before GGUF",
}


# Values and bytes of a block, by ggml type. Of formats that Squall does not run, too: their files
# can be inspected.
_BLOCKS = {
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 31: (32, 18), 32: (32, 18), 33: (32, 18), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
    **{id: (format.block, format.block_bytes) for id, format in GGML_FORMATS.items()},
}  # fmt: skip
_TYPE_NAMES = {**UNSUPPORTED, **{id: format.name for id, format in GGML_FORMATS.items()}}


@dataclass(frozen=True, slots=True)
class PartHeader:
    """The parsed header of one file, and the byte where its data starts: entries count from it."""

    version: int
    metadata: dict[str, Field]
    entries: tuple[Entry, ...]
    data_start: int


@dataclass(frozen=True, slots=True)
class _Span:
    """A checked string of `count` bytes, or array of `count` elements, not yet decoded."""

    start: int
    count: int
    element: int | None = None


class Cursor:
    """A position in the header that never passes its end."""

    def __init__(self, buffer: Buffer, source: str, limit: int) -> None:
        self.buffer = buffer
        self.source = source
        self.position = 0
        self.limit = limit
        self.end = min(len(buffer), limit)
        self.strings = 0

    def fault(self, problem: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(
            f"{quote(self.source)} is malformed: {problem} (near byte {self.position})"
        )

    def need(self, size: int, what: str) -> None:
        """Check that `size` more bytes are there."""
        left = self.end - self.position
        if size <= left:
            return
        if self.end == self.limit < len(self.buffer):
            raise self.fault(
                f"with {what} the header passes the limit of {MAX_HEADER_BYTES >> 20} MiB"
            )
        raise self.fault(f"{what} needs {size} bytes and {left} are left; the file may be cut off")

    def take(self, size: int, what: str) -> int:
        """Pass over `size` bytes; returns where they start."""
        self.need(size, what)
        start = self.position
        self.position = start + size
        return start

    def record(self, layout: Struct, what: str) -> tuple[Any, ...]:
        return layout.unpack_from(self.buffer, self.take(layout.size, what))

    def integer(self, layout: Struct, what: str) -> int:
        value: int = self.record(layout, what)[0]
        return value

    def count(self, what: str, limit: int, item_bytes: int) -> int:
        """A number of items, each of at least `item_bytes`."""
        count = self.integer(_U64, f"the number of {what}")
        if count > limit:
            raise self.fault(f"it claims {count} {what}; the limit is {limit}")
        self.need(count * item_bytes, f"{count} {what}")
        return count

    def name(self, what: str, limit: int) -> str:
        size = self.integer(_U64, f"the length of {what}")
        if not 1 <= size <= limit:
            raise self.fault(f"{what} has {size} bytes; 1 to {limit} are allowed")
        start = self.take(size, what)
        try:
            return str(self.buffer[start : start + size], "utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} is not UTF-8") from None


def parse_header(buffer: Buffer, source: str, limit: int = MAX_HEADER_BYTES) -> PartHeader:
    """Read and check the header of one file, at most `limit` bytes; `source` names it in errors."""
    cursor = Cursor(buffer, source, limit)
    version = _version(cursor)
    tensors = cursor.count("tensors", MAX_TENSORS, _TENSOR_BYTES)
    fields = _scan_fields(cursor, cursor.count("metadata fields", MAX_FIELDS, _FIELD_BYTES))
    alignment = _alignment(cursor, fields)
    entries = _read_table(cursor, tensors, alignment)
    data_start = -(-cursor.position // alignment) * alignment
    _check_places(cursor, entries, data_start)
    metadata = {key: _decode(buffer, value) for key, value in fields.items()}
    return PartHeader(version, metadata, entries, data_start)


def _version(cursor: Cursor) -> int:
    head = cursor.buffer[:32]
    if head[:4] != b"GGUF":
        hint = next((text for start, text in _HINTS.items() if head.startswith(start)), "")
        raise InvalidCheckpoint(
            f"{quote(cursor.source)} is not a GGUF file: it starts with {head[:4]!r}, not b'GGUF'"
            + (f"; {hint}" if hint else "")
        )
    cursor.take(4, "the magic number")
    version = cursor.integer(_U32, "the version")
    if version in VERSIONS:
        return version
    if int.from_bytes(head[4:8], "big") in VERSIONS:
        raise UnsupportedModel(
            f"{quote(cursor.source)} is a big-endian GGUF file; Squall reads little-endian "
            "ones: convert the model again"
        )
    raise UnsupportedModel(
        f"{quote(cursor.source)} has GGUF version {version}; Squall reads 2 and 3: "
        "convert the model again"
    )


def _scan_fields(cursor: Cursor, count: int) -> dict[str, Scalar | _Span]:
    fields: dict[str, Scalar | _Span] = {}
    for _ in range(count):
        key = cursor.name("a metadata key", MAX_KEY_BYTES)
        if key in fields:
            raise cursor.fault(f"metadata key {quote(key)} appears twice")
        fields[key] = _scan_value(cursor, quote(key))
    return fields


def _scan_value(cursor: Cursor, key: str) -> Scalar | _Span:
    kind = cursor.integer(_U32, f"the type of {key}")
    if kind == _STRING:
        size = cursor.integer(_U64, f"the length of {key}")
        return _Span(cursor.take(size, key), size)
    if kind == _ARRAY:
        return _scan_array(cursor, key)
    if kind not in NUMBERS:
        raise cursor.fault(f"{key} has value type {kind}; known: 0 to 12")
    value: Scalar = _decode_numbers(cursor.buffer, _scan_numbers(cursor, kind, 1, key)).item()
    return value


def _scan_array(cursor: Cursor, key: str) -> _Span:
    element = cursor.integer(_U32, f"the element type of {key}")
    count = cursor.integer(_U64, f"the length of {key}")
    if element == _ARRAY:
        raise UnsupportedModel(
            f"{quote(cursor.source)}: {key} is an array of arrays, which Squall does not read"
        )
    if element == _STRING:
        return _Span(_scan_strings(cursor, count, key), count, element)
    if element not in NUMBERS:
        raise cursor.fault(f"{key} has element type {element}; known: 0 to 12")
    return _scan_numbers(cursor, element, count, f"{key} with {count} elements")


def _scan_numbers(cursor: Cursor, kind: int, count: int, what: str) -> _Span:
    start = cursor.take(count * NUMBERS[kind].itemsize, what)
    if kind == _BOOL:
        most = np.frombuffer(cursor.buffer, np.uint8, count, start).max(initial=0)
        if most > 1:
            raise cursor.fault(f"{what} has a bool with value {most}; 0 and 1 are allowed")
    return _Span(start, count, kind)


def _scan_strings(cursor: Cursor, count: int, key: str) -> int:
    cursor.need(count * 8, f"{key} with {count} strings")
    cursor.strings += count
    if cursor.strings > MAX_STRINGS:
        raise cursor.fault(
            f"with {key} the metadata has {cursor.strings} strings; the limit is {MAX_STRINGS}"
        )
    start = position = cursor.position
    length_of, buffer, last = _U64.unpack_from, cursor.buffer, cursor.end - 8
    for index in range(count):
        if position > last:
            raise cursor.fault(
                f"{key} runs past the end at string {index} of {count}; the file may be cut off"
            )
        position += 8 + length_of(buffer, position)[0]
    cursor.take(position - start, key)
    return start


def _alignment(cursor: Cursor, fields: dict[str, Scalar | _Span]) -> int:
    value = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value.bit_count() != 1:
        shown = "not a number" if isinstance(value, _Span) else repr(value)
        raise cursor.fault(
            f"general.alignment is {shown}; a power of two from 8 to {MAX_ALIGNMENT} is allowed"
        )
    return value


def _read_table(cursor: Cursor, count: int, alignment: int) -> tuple[Entry, ...]:
    entries: dict[str, Entry] = {}
    for _ in range(count):
        entry = _read_entry(cursor, alignment)
        if entry.name in entries:
            raise cursor.fault(f"tensor {quote(entry.name)} appears twice")
        entries[entry.name] = entry
    return tuple(entries.values())


def _read_entry(cursor: Cursor, alignment: int) -> Entry:
    name = cursor.name("a tensor name", MAX_NAME_BYTES)
    tensor = f"tensor {quote(name)}"
    dims = cursor.integer(_U32, f"the dimensions of {tensor}")
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.fault(f"{tensor} has {dims} dimensions; 1 to {MAX_DIMS} are allowed")
    *axes, type_id, offset = cursor.record(_PLACES[dims], f"the shape, type and offset of {tensor}")
    if offset % alignment:
        raise cursor.fault(
            f"{tensor} has offset {offset}, no multiple of the alignment {alignment}"
        )
    shape, elements = tuple(axes[::-1]), math.prod(axes)  # GGUF stores the fastest axis first
    if not 1 <= elements < 1 << 63:
        raise cursor.fault(
            f"{tensor} has shape {shape}; no axis may be 0 or the product reach 2**63"
        )
    kind = _TYPE_NAMES.get(type_id, f"type {type_id}")
    block, block_bytes = _BLOCKS.get(type_id, (1, 0))
    if shape[-1] % block:
        raise cursor.fault(f"{tensor} has {shape[-1]} columns, not whole {kind} blocks of {block}")
    return Entry(name, kind, shape, elements // block * block_bytes, offset)


def _check_places(cursor: Cursor, entries: Iterable[Entry], data_start: int) -> None:
    ordered = sorted(entries, key=lambda entry: entry.start)
    for before, after in itertools.pairwise(ordered):
        if before.start + before.nbytes > after.start:
            raise cursor.fault(f"tensors {quote(before.name)} and {quote(after.name)} overlap")
    for entry in ordered:
        end = data_start + entry.start + entry.nbytes
        if end > len(cursor.buffer):
            raise cursor.fault(
                f"tensor {quote(entry.name)} ends at byte {end} of a file of "
                f"{len(cursor.buffer)}; the file may be cut off"
            )


def _decode(buffer: Buffer, value: Scalar | _Span) -> Field:
    if not isinstance(value, _Span):
        return value
    if value.element is None:
        # Text for people and templates: what is not UTF-8 becomes U+FFFD.
        return str(buffer[value.start : value.start + value.count], "utf-8", "replace")
    if value.element == _STRING:
        return _decode_strings(buffer, value)
    return _decode_numbers(buffer, value)


def _decode_strings(buffer: Buffer, span: _Span) -> list[str]:
    """Tokens, merges. Bytes that are not UTF-8 are kept: `encode("utf-8", "surrogateescape")`."""
    strings, position, length_of = [], span.start, _U64.unpack_from
    for _ in range(span.count):
        start = position + 8
        position = start + length_of(buffer, position)[0]
        strings.append(buffer[start:position].decode("utf-8", "surrogateescape"))
    return strings


def _decode_numbers(buffer: Buffer, span: _Span) -> NDArray[Any]:
    dtype = NUMBERS[span.element or 0]
    if not span.count:
        return np.empty(0, dtype)
    # A copy, because elements in the file need not be aligned.
    numbers = np.frombuffer(buffer, dtype, span.count, span.start).copy()
    numbers.setflags(write=False)
    return numbers
