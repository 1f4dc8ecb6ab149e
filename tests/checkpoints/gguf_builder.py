"""GGUF files written by hand, so that a test can put any number anywhere."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B"}
CODES |= {U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: float) -> bytes:
    return struct.pack("<I" + CODES[kind], kind, value)


def string(value: str | bytes, length: int | None = None) -> bytes:
    return struct.pack("<I", STRING) + text(value, length)


def array(element: int, payload: bytes, count: int) -> bytes:
    return struct.pack("<IIQ", ARRAY, element, count) + payload


def strings(values: Sequence[str | bytes]) -> bytes:
    return array(STRING, b"".join(map(text, values)), len(values))


@dataclass(frozen=True)
class TensorEntry:
    """`dims` fastest axis first, as in the file."""

    name: str | bytes = "t"
    dims: tuple[int, ...] = (4,)
    type_id: int = 0
    offset: int = 0
    dims_count: int | None = None
    name_length: int | None = None

    def to_bytes(self) -> bytes:
        count = len(self.dims) if self.dims_count is None else self.dims_count
        return (
            text(self.name, self.name_length)
            + struct.pack(f"<I{len(self.dims)}Q", count, *self.dims)
            + struct.pack("<IQ", self.type_id, self.offset)
        )


@dataclass(frozen=True)
class File:
    """A GGUF file; counts are the true ones unless given. `fields` are (key, type and value)."""

    fields: Sequence[tuple[str | bytes, bytes]] = ()
    tensors: Sequence[TensorEntry] = ()
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    field_count: int | None = None
    alignment: int = field(default=32, kw_only=True)

    def with_(self, **changes: object) -> File:
        return replace(self, **changes)  # type: ignore[arg-type]

    def to_bytes(self) -> bytes:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        fields = len(self.fields) if self.field_count is None else self.field_count
        header = self.magic + struct.pack("<IQQ", self.version, tensors, fields)
        header += b"".join(text(key) + value for key, value in self.fields)
        header += b"".join(entry.to_bytes() for entry in self.tensors)
        return header + bytes(-len(header) % self.alignment) + self.data


def small() -> File:
    """A valid file with every kind of value and two tensors."""
    fields = [
        ("general.architecture", string("llama")),
        ("general.alignment", scalar(U32, 32)),
        ("flag", scalar(BOOL, 1)),
        ("wide", scalar(I64, -(1 << 40))),
        ("real", scalar(F64, 0.25)),
        ("tokens", strings(["a", "bc", "", "ü"])),
        ("types", array(I32, struct.pack("<3i", 1, -2, 3), 3)),
        ("flags", array(BOOL, b"\x00\x01", 2)),
    ]
    tensors = [TensorEntry("a", (4, 2)), TensorEntry("b", (32,), 8, 32)]
    return File(fields, tensors, bytes(range(32)) + bytes(34))
