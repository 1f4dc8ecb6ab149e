"""A checkpoint described as plain data, safe to print: text from the file is escaped."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np

from squall.checkpoints.base import Checkpoint, Field, Kind

Item = int | float | bool | str


@dataclass(frozen=True, slots=True)
class MetadataField:
    """One metadata field: `items` is its value, or the first values of an array of `length`.

    `kind` is bool, int, float, text, object (shown as JSON), null or, of an array, text or a NumPy
    dtype; `cut`: there is more.
    """

    key: str
    kind: str
    items: tuple[Item, ...]
    length: int | None = None
    cut: bool = False

    def __str__(self) -> str:
        text = ", ".join(map(str, self.items)) + ("..." if self.cut else "")
        return text if self.length is None else f"{self.kind}[{self.length}] {text}".rstrip()


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor, without its data."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class FormatTotal:
    """All tensors of one number format."""

    format: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is in a checkpoint; every text in it can be written to a terminal."""

    path: str
    kind: Kind
    quantization: str
    size_bytes: int
    version: int
    parts: tuple[str, ...]
    metadata: tuple[MetadataField, ...]
    tensors: tuple[TensorLine, ...]
    formats: tuple[FormatTotal, ...]
    parameters: int


def describe(source: Checkpoint, *, array_items: int = 6, text_chars: int = 200) -> Inspection:
    """Describe an open checkpoint; arrays and texts are cut to the given lengths."""
    tensors = tuple(
        TensorLine(escape(t.name), t.format, t.shape, t.nbytes) for t in source.tensors.values()
    )
    return Inspection(
        path=escape(str(source.path)),
        kind=source.kind,
        quantization=escape(source.quantization),
        size_bytes=source.size_bytes,
        version=source.version,
        parts=tuple(escape(str(part)) for part in source.parts),
        metadata=tuple(_field(k, v, array_items, text_chars) for k, v in source.metadata.items()),
        tensors=tensors,
        formats=_totals(tensors),
        parameters=sum(prod(tensor.shape) for tensor in tensors),
    )


def escape(text: str) -> str:
    """Escape what could steer a terminal: controls, line ends, bidi marks, surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _field(key: str, value: Field, array_items: int, text_chars: int) -> MetadataField:
    key = escape(key)
    if isinstance(value, str):
        cut = len(value) > text_chars
        return MetadataField(key, "text", (escape(value[:text_chars]),), cut=cut)
    if value is None or isinstance(value, dict):
        text = json.dumps(value)
        kind = "null" if value is None else "object"
        return MetadataField(key, kind, (text[:text_chars],), cut=len(text) > text_chars)
    if isinstance(value, list):
        texts = tuple(escape(str(item)[:text_chars]) for item in value[:array_items])
        return MetadataField(key, "text", texts, len(value), len(value) > array_items)
    if isinstance(value, np.ndarray):
        numbers = tuple(value[:array_items].tolist())
        return MetadataField(key, value.dtype.name, numbers, value.size, value.size > array_items)
    return MetadataField(key, type(value).__name__, (value,))


def _totals(tensors: tuple[TensorLine, ...]) -> tuple[FormatTotal, ...]:
    count, parameters, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for tensor in tensors:
        count[tensor.format] += 1
        parameters[tensor.format] += prod(tensor.shape)
        nbytes[tensor.format] += tensor.nbytes
    return tuple(
        FormatTotal(f, count[f], parameters[f], nbytes[f]) for f, _ in nbytes.most_common()
    )
