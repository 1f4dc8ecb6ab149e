"""Hostile GGUF files: each must end in one of our errors, quickly and in little memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from checkpoints import gguf_builder as b

EXTREMES = (0, 1, 5, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
U32_EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)


def hostile() -> Iterator[tuple[str, bytes]]:
    """Malformed files by name."""
    yield from _not_gguf()
    yield from _counts()
    yield from _values()
    yield from _names()
    yield from _tensors()
    yield from _alignments()
    yield from _big()


def _not_gguf() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "zeros", bytes(64)
    yield "magic only", b"GGUF"
    yield "lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "web page", b"<!DOCTYPE html><html></html>"
    yield "big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    yield "wrong magic", b.small().with_(magic=b"GGML").to_bytes()
    for version in (0, 1, 4, 2**31, 2**32 - 1):
        yield f"version {version}", b.small().with_(version=version).to_bytes()


def _counts() -> Iterator[tuple[str, bytes]]:
    bare = b.File()
    for count in EXTREMES[1:]:
        yield f"{count} tensors", bare.with_(tensor_count=count).to_bytes()
        yield f"{count} fields", bare.with_(field_count=count).to_bytes()
        yield f"{count} both", b.File(field_count=count, tensor_count=count).to_bytes()
        if count > 8:
            yield f"small, {count} fields", b.small().with_(field_count=count).to_bytes()
            yield f"small, {count} tensors", b.small().with_(tensor_count=count).to_bytes()


def _field(key: str, value: bytes) -> bytes:
    return b.File([(key, value)]).to_bytes()


def _values() -> Iterator[tuple[str, bytes]]:
    for length in EXTREMES[3:]:
        yield f"string of {length}", _field("k", b.string("abc", length))
        for element in range(13):
            yield f"array of {length} x {element}", _field("k", b.array(element, b"", length))
        yield (
            f"array of a string of {length}",
            _field("k", b.array(b.STRING, b.text("abc", length), 1)),
        )
    for kind in (13, 14, 255, 2**31, 2**32 - 1):
        yield f"value type {kind}", _field("k", struct.pack("<IQ", kind, 0))
        yield f"element type {kind}", _field("k", b.array(kind, bytes(64), 1))
    yield "bool of 2", _field("k", b.scalar(b.BOOL, 2))
    yield "bools of 255", _field("k", b.array(b.BOOL, b"\x01\xff", 2))
    yield "nested array", _field("k", b.array(b.ARRAY, struct.pack("<IQ", 0, 0), 1))
    yield "nested empty array", _field("k", b.array(b.ARRAY, b"", 0))
    deep = struct.pack("<IQ", b.ARRAY, 1) * 100_000
    yield "nested 100000 deep", _field("k", b.array(b.ARRAY, deep, 1))
    # A reader that loops over the claimed length without looking at what is left never ends.
    hang = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k"
    hang += struct.pack("<IIQ", b.ARRAY, 0, 2**63)[: 43 - len(hang)]
    yield "43 bytes", hang
    yield "49 bytes", b"GGUF" + struct.pack("<IQQQsIIQ", 3, 0, 1, 1, b"k", b.ARRAY, b.ARRAY, 2**63)


def _names() -> Iterator[tuple[str, bytes]]:
    yield "duplicate key", b.File([("k", b.scalar(b.U8, 1))] * 2).to_bytes()
    yield "empty key", _field("", b.scalar(b.U8, 1))
    yield "key not UTF-8", b.File([(b"\xff\xfe", b.scalar(b.U8, 1))]).to_bytes()
    yield "long key", _field("k" * 2000, b.scalar(b.U8, 1))
    for length in EXTREMES[3:]:
        raw = b.text("k", length) + b.scalar(b.U8, 1)
        yield f"key of {length}", b.File(field_count=1).to_bytes()[:24] + raw
    for name in (b"", b"\xc3\x28", b"n" * 300):
        entry = b.TensorEntry(name)
        yield f"tensor name {name[:4]!r}", b.File([], [entry], bytes(64)).to_bytes()
    twice = [b.TensorEntry("t"), b.TensorEntry("t", offset=32)]
    yield "duplicate tensor", b.File([], twice, bytes(64)).to_bytes()


def _tensors() -> Iterator[tuple[str, bytes]]:
    def one(**changes: object) -> bytes:
        entry = b.TensorEntry(**changes)  # type: ignore[arg-type]
        return b.File([], [entry], bytes(64)).to_bytes()

    for value in EXTREMES:
        if value not in (1, 5):
            yield f"dim {value}", one(dims=(value,))
            yield f"dims {value}", one(dims=(value, value, value, value))
            yield f"dims {value} of an unknown type", one(dims=(value,), type_id=99)
        if value:
            yield f"offset {value}", one(offset=value)
            yield f"aligned offset {value}", one(offset=value & ~31 or 64)
        if value != 1:
            yield f"name length {value}", one(name_length=value)
    for value in (0, 2, 5, 2**31, 2**32 - 1):
        yield f"{value} dimensions", one(dims_count=value)
    yield "wrapping dims", one(dims=(2**32, 2**32))
    yield "wrapping to small", one(dims=(2**62, 4, 2))
    yield "wrapping bytes", one(dims=(2**62,))
    for type_id in (4, 5, 16, 36, 99, 2**31, 2**32 - 1):
        yield f"tensor type {type_id}", one(dims=(256,), type_id=type_id)
    for type_id in (2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15):
        yield f"no whole block of {type_id}", one(dims=(33,), type_id=type_id)
    yield "unaligned offset", one(offset=4)
    yield "past the end", one(dims=(17,))
    for offset, dims in ((0, (4,)), (0, (16,)), (32, (8,))):
        pair = [b.TensorEntry("a", (16,)), b.TensorEntry("b", dims, offset=offset)]
        yield f"overlap at {offset} with {dims}", b.File([], pair, bytes(64)).to_bytes()


def _alignments() -> Iterator[tuple[str, bytes]]:
    wrong = [b.scalar(b.U32, n) for n in (0, 1, 3, 4, 31, 33, 2**17, 2**31, 2**32 - 1)]
    wrong += [b.scalar(b.U64, 2**63), b.scalar(b.I32, -32), b.scalar(b.F32, 32.0)]
    wrong += [b.scalar(b.BOOL, 1), b.string("32"), b.array(b.U32, struct.pack("<I", 32), 1)]
    for number, value in enumerate(wrong):
        yield f"alignment {number}", _field("general.alignment", value)
    shifted = [("general.alignment", b.scalar(b.U32, 64))]
    entries = [b.TensorEntry("a", (8,)), b.TensorEntry("b", (8,), offset=32)]
    yield "offset not to alignment", b.File(shifted, entries, bytes(96), alignment=64).to_bytes()


def _big() -> Iterator[tuple[str, bytes]]:
    """Much of something well-formed, and a fault at the very end."""
    fault = ("end", struct.pack("<I", 77))
    empty = b.array(b.STRING, bytes(8 << 20), 1 << 20)
    yield "2^20 empty strings", b.File([("k", empty), fault]).to_bytes()
    yield "2^22 empty strings", _field("k", b.array(b.STRING, bytes(8 << 22), 1 << 22))
    over = b.array(b.STRING, bytes((8 << 21) + 8), (1 << 21) + 1)
    yield "2^21 empty strings and one", _field("k", over)
    short = b.array(b.STRING, b.text("ab") * (1 << 20), 1 << 20)
    yield "2^20 short strings", b.File([("k", short), fault]).to_bytes()
    yield (
        "24 MiB of numbers",
        b.File([("k", b.array(b.F64, bytes(24 << 20), 3 << 20)), fault]).to_bytes(),
    )
    yield (
        "24 MiB of bools",
        b.File([("k", b.array(b.BOOL, bytes(24 << 20), 24 << 20)), fault]).to_bytes(),
    )
    yield "40 MiB of text", _field("k", b.string(b"x" * (40 << 20)))
    many = [(f"key {i}", b.scalar(b.U8, 1)) for i in range(16_000)]
    yield "16000 fields", b.File([*many, fault]).to_bytes()
    yield (
        "17000 fields",
        b.File([*many, *((f"more {i}", b.scalar(b.U8, 1)) for i in range(1000))]).to_bytes(),
    )
    entries = [b.TensorEntry(f"tensor {i}", (8,), offset=32 * i) for i in range(32_000)]
    overlap = b.TensorEntry("last", (8,), offset=32 * 16_000)
    yield (
        "32000 tensors, an overlap",
        b.File([], [*entries, overlap], bytes(32 * 32_000)).to_bytes(),
    )
    crowded = b.File([("k", empty), *many], [*entries, overlap], bytes(32 * 32_000))
    yield "all limits at once", crowded.to_bytes()
    yield "32000 tensors, a twin", b.File([], [*entries, entries[0]], bytes(32 * 32_000)).to_bytes()
    many_more = [b.TensorEntry(f"tensor {i}", (8,), offset=32 * i) for i in range(60_000)]
    yield "60000 tensors", b.File([], many_more, bytes(32 * 60_000)).to_bytes()
