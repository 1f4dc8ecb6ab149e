"""Quantizing to GGUF, from a folder or from another GGUF file."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.gguf_header import DEFAULT_ALIGNMENT, NUMBERS
from squall.checkpoints.writing import Item, Part, copy_of, replacing, write_parts
from squall.convert.matrices import Matrix, Work
from squall.errors import InvalidRequest, UnsupportedModel
from squall.program import Slice
from squall.quant import FORMATS
from squall.recipes.gguf_parts import NAMING
from squall.recipes.gguf_write import describe
from squall.recipes.modules import gguf_architecture, row_order
from squall.roles import roles
from squall.spec import Decoder
from squall.text.gguf_metadata import gguf_tokenizer

# general.file_type, by what most of the matrices are.
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18, "bf16": 32,
}  # fmt: skip


def write_gguf(work: Work, path: Path, *, force: bool) -> None:
    """Write one GGUF file; a tied head that is quantized gets a tensor of its own."""
    if work.quantizer.checkpoint.kind == "uqff":
        raise UnsupportedModel("a UQFF file is quantized already; start from the float weights")
    if not path.parent.is_dir():
        raise InvalidRequest(f"there is no folder {path.parent}; make it first")
    job = _job(work)
    items = [*job.items(), *job.extras()]
    formats = [item.format for item in items if len(item.shape) > 1]
    most = max(sorted(set(formats)), key=formats.count)
    job.metadata["general.quantization_version"] = 2
    job.metadata["general.file_type"] = FILE_TYPES.get(most, 0)
    with replacing(path, force=force) as file:
        _write(file, job.metadata, items)


def _job(work: Work) -> _Job:
    given = (work.quantizer, work.recipe, work.plan, work.importance)
    checkpoint, recipe = work.quantizer.checkpoint, work.recipe
    if checkpoint.kind == "gguf":
        kept = {k: v for k, v in checkpoint.metadata.items() if not k.startswith("split.")}
        kept.pop("general.alignment", None)
        return _Job(*given, recipe.decoder, kept, {})
    described = describe(recipe.architecture, recipe.decoder)
    metadata = described.metadata | gguf_tokenizer(checkpoint.path, recipe.decoder.vocab)
    return _Job(*given, described.decoder, metadata, described.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class _Job(Work):
    """stored: the decoder of the weights in the new file."""

    stored: Decoder
    metadata: dict[str, Any]
    tensors: Mapping[str, NDArray[np.float32]]

    def items(self) -> Iterator[Item]:
        """Every weight; those that lie in one tensor stay together."""
        shapes = roles(self.recipe.decoder)
        if self.recipe.decoder.tied and self._target("head", self.recipe.names["embed.weight"]):
            shapes["head.weight"] = shapes["embed.weight"]
        done: set[str] = set()
        for role, shape in shapes.items():
            if role in done:
                continue
            name, group = self._fused(role)
            done.update(group)
            whole = (sum(shapes[member][0] for member in group), *shape[1:])
            slices = tuple(part for member in group for part in self._slices(member))
            if len(whole) == 1:
                yield _float_item(name, self._vector(role, slices))
            else:
                yield self._matrix(role, name, slices, whole)

    def extras(self) -> Iterator[Item]:
        """Small tensors that describe the model, copied."""
        for name, values in self.tensors.items():
            yield _float_item(name, values)
        if self.quantizer.checkpoint.kind == "gguf":
            used = {part.tensor for parts in self.recipe.names.values() for part in parts}
            for name, tensor in self.quantizer.checkpoint.tensors.items():
                if name not in used:
                    yield Item(name, tensor.format, tensor.shape, copy_of(tensor))

    def _slices(self, role: str) -> tuple[Slice, ...]:
        names = self.recipe.names
        return names[role] if role in names else names["embed.weight"]

    def _target(self, stem: str, slices: tuple[Slice, ...]) -> str | None:
        """What a matrix becomes, if it is not what it is."""
        tensor = self.quantizer.checkpoint.tensors[slices[0].tensor]
        found = self.plan.target(stem, tensor.format, tensor.cols)
        return None if found == tensor.format else found

    def _fused(self, role: str) -> tuple[str, list[str]]:
        """A role's tensor, and all roles in it, if the role is the first of these."""
        layer, stem, kind = NAMING.split(role)
        names = self.recipe.names
        for name, stems in NAMING.fused.items():
            group = [f"{role.removesuffix(f'{stem}.{kind}')}{s}.{kind}" for s in stems]
            if stem == stems[0] and all(member in names for member in group):
                tensors = {part.tensor for member in group for part in names[member]}
                if len(tensors) == 1:
                    return f"{layer}{name}.{kind}", group
        return NAMING.name(role), [role]

    def _matrix(
        self, role: str, name: str, slices: tuple[Slice, ...], shape: tuple[int, ...]
    ) -> Item:
        stem, cols = role.removesuffix(".weight"), shape[-1]
        stored = self.quantizer.checkpoint.tensors[slices[0].tensor].format
        format = self._target(stem, slices) or stored
        if FORMATS[format].ggml_id is None:
            raise UnsupportedModel(f"GGUF has no {format} ({name}); choose another type, or UQFF")
        experts = shape[0] if len(shape) == 3 else 1
        known = self.importance.get(name.removesuffix(".weight"))
        if known is not None and known.shape != (experts, cols):
            raise InvalidRequest(
                f"the imatrix has {known.shape} for {name}, which has {(experts, cols)}; "
                "it is of another model"
            )
        order = self._order(role)
        matrix = Matrix(
            name, slices, 0, shape[-2], cols, format, experts, order=order, importance=known
        )
        return Item(name, format, shape, Part(matrix.nbytes, self.quantizer.chunks(matrix)))

    def _vector(self, role: str, slices: tuple[Slice, ...]) -> NDArray[np.float32]:
        tensors = self.quantizer.checkpoint.tensors
        parts = [tensors[p.tensor].to_float32().reshape(-1)[p.start : p.stop] for p in slices]
        order, values = self._order(role), np.concatenate(parts)
        return (values if order is None else values[order]) + np.float32(self._offset(role))

    def _offset(self, role: str) -> float:
        """What is added to the weights of norms that are stored without their 1."""
        changed = self.recipe.decoder.norm.unit_offset and not self.stored.norm.unit_offset
        return 1.0 if changed and role.endswith("norm.weight") else 0.0

    def _order(self, role: str) -> NDArray[np.intp] | None:
        """Where rows come from that the file has in an order of its own."""
        if self.quantizer.checkpoint.kind == "gguf":
            return None
        known = gguf_architecture(self.recipe.architecture)
        return row_order(known, self.recipe.decoder, role.rpartition(".")[0])


def _float_item(name: str, values: NDArray[np.float32]) -> Item:
    return Item(name, "f32", values.shape, Part(values.nbytes, [values.astype("<f4").tobytes()]))


def _write(file: IO[bytes], metadata: Mapping[str, Any], items: list[Item]) -> None:
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(items), len(metadata)))
    for key, value in metadata.items():
        file.write(_text(key) + _field(key, value))
    at = 0
    for item in items:
        id = FORMATS[item.format].ggml_id
        dims = item.shape[::-1]
        file.write(_text(item.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        file.write(struct.pack("<IQ", id, at))
        at += _aligned(item.part.nbytes)
    for item in items:
        file.write(bytes(_aligned(file.tell()) - file.tell()))
        write_parts(file, [item.part])
    file.write(bytes(_aligned(file.tell()) - file.tell()))


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


# NumPy kind and bytes, such as "f4" -> GGUF's number of a type.
_TYPES = {dtype.str[1:]: id for id, dtype in NUMBERS.items()}
_STRING, _ARRAY = 8, 9


def _field(key: str, value: object) -> bytes:
    """Type and value; a number gets the type that readers expect of it."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _TYPES["b1"], value)
    if isinstance(value, int):
        kind = "u4" if 0 <= value < 1 << 32 else "i4" if -(1 << 31) <= value < 0 else "i8"
        kind = "u8" if value >= 1 << 63 else kind
        return struct.pack("<I", _TYPES[kind]) + np.array(value, f"<{kind}").tobytes()
    if isinstance(value, float):
        exact = float(np.float32(value)) == value or key.split(".")[0] != "general"
        return struct.pack("<If", 6, value) if exact else struct.pack("<Id", 12, value)
    if isinstance(value, list):
        texts = b"".join(_text(text) for text in value)
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + texts
    assert isinstance(value, np.ndarray)
    item = _TYPES[value.dtype.str[1:]]
    return struct.pack("<IIQ", _ARRAY, item, value.size) + value.tobytes()
