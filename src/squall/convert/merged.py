"""Models with adapters in their weights, as if they were stored so; and written as folders."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import ByteTensor, Checkpoint, Field, Tensor
from squall.checkpoints.folder import CONFIG
from squall.checkpoints.writing import Item, Part, write_safetensors
from squall.errors import InvalidRequest
from squall.files import MAX_JSON_BYTES
from squall.program import Matrix, Names, Slice, Vector
from squall.quant import FORMATS
from squall.recipes import Recipe
from squall.roles import Shapes, roles
from squall.weights import Progress, WeightStore

if TYPE_CHECKING:
    from squall.adapters.lora import Lora

WEIGHTS = "model.safetensors"
_BESIDE = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows of a tensor: those of an expert of a matrix, from `first` on."""

    start: int
    stop: int
    matrix: Matrix
    expert: int
    first: int


@dataclass(frozen=True, eq=False)
class _Merged(Tensor):
    name: str
    format: str
    shape: tuple[int, ...]
    store: WeightStore
    spans: tuple[_Span, ...]

    def row_data(self, start: int, stop: int) -> NDArray[np.uint8]:
        parts = []
        for span in self.spans:
            first, last = max(start, span.start), min(stop, span.stop)
            if first < last:
                rows = self.store.rows(span.matrix, span.expert).data
                rows = rows.reshape(span.matrix.rows, -1)
                parts.append(rows[first - span.start + span.first :][: last - first].reshape(-1))
        return np.concatenate(parts)


def merged(
    checkpoint: Checkpoint, recipe: Recipe, loras: Sequence[tuple[Lora, float]]
) -> tuple[Checkpoint, Recipe]:
    """A model with the sum of adapters, each with its weight, in its weights.

    A head that shares the table of embeddings gets a tensor of its own if one of the two changes.
    """
    from squall.adapters.lora import merged_terms, merged_vectors  # slow to import

    terms, vectors = merged_terms(loras), merged_vectors(loras)
    store = WeightStore(checkpoint, merged=terms, vectors=vectors)
    (part,) = recipe.parts
    spec, names, metadata = part.spec, dict(part.names), dict(checkpoint.metadata)
    tensors, spans = dict(checkpoint.tensors), dict[str, list[_Span]]()
    shapes = roles(spec)
    for role in names:
        for tensor, span in _spans(role, shapes[role], names[role]):
            spans.setdefault(tensor, []).append(span)
    if spec.tied and terms.keys() & {("embed", 0), ("head", 0)}:
        spec, own, table = (
            replace(spec, tied=False),
            part.naming.name("head.weight"),
            shapes["embed.weight"],
        )
        spans[own] = [span for _, span in _spans("head.weight", table, names["embed.weight"])]
        tensors[own] = tensors[names["embed.weight"][0].tensor]
        names["head.weight"] = (Slice(own, 0, table[0]),)
        if checkpoint.kind != "gguf":
            metadata = _untied(metadata)
    changed = {role for role, _ in terms} | {"head"}
    for name, found in spans.items():
        if any(span.matrix.role in changed for span in found):
            t = tensors[name]
            tensors[name] = _Merged(name, t.format, t.shape, store, tuple(found))
    biases = {role for (role, _), found in terms.items() for t in found if t.bias is not None}
    for role in (*vectors, *(f"{role}.bias" for role in biases)):
        _set_vector(role, shapes, names, store, tensors)
    made = replace(part, spec=spec, names=MappingProxyType(names))
    edited = replace(checkpoint, tensors=MappingProxyType(tensors), metadata=metadata)
    return edited, replace(recipe, parts=(made,))


def merge_folder(
    checkpoint: Checkpoint,
    recipe: Recipe,
    loras: Sequence[tuple[Lora, float]],
    folder: Path,
    *,
    progress: Progress | None = None,
) -> None:
    """Write the merged model as transformers would, with what lies beside its weights.

    The folder is there whole or not at all. progress: called with bytes done and bytes in all.
    """
    if checkpoint.kind != "folder" or checkpoint.quantization:
        raise InvalidRequest(
            f"{checkpoint.path} is no folder of transformers with float weights, which adapters "
            "can be merged into"
        )
    if folder.exists():
        raise InvalidRequest(f"{folder} exists; give another name, or remove it")
    edited, _ = merged(checkpoint, recipe, loras)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        temporary.mkdir(parents=True)
        for file in sorted(checkpoint.path.iterdir()):
            small = file.is_file() and file.stat().st_size <= MAX_JSON_BYTES
            if small and file.suffix in _BESIDE and not file.name.endswith(".index.json"):
                shutil.copyfile(file, temporary / file.name)
        (temporary / CONFIG).write_text(json.dumps(dict(edited.metadata), indent=2))
        items = list(_items(edited.tensors, progress))
        write_safetensors(temporary / WEIGHTS, items, force=False, metadata={"format": "pt"})
        os.replace(temporary, folder)
    except OSError as error:
        raise InvalidRequest(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _items(tensors: Mapping[str, Tensor], progress: Progress | None) -> Iterator[Item]:
    sizes = {name: t.rows * FORMATS[t.format].row_bytes(t.cols) for name, t in tensors.items()}
    done, whole = 0, sum(sizes.values())

    def chunks(tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        nonlocal done
        spans = tensor.spans if isinstance(tensor, _Merged) else [slice(0, tensor.rows)]
        for span in spans:
            data = tensor.row_data(span.start, span.stop)
            yield data
            done += data.nbytes
            if progress is not None:
                progress(done, whole)

    for name, tensor in tensors.items():
        yield Item(name, tensor.format, tensor.shape, Part(sizes[name], chunks(tensor)))


def _spans(
    role: str, shape: tuple[int, ...], slices: tuple[Slice, ...]
) -> Iterator[tuple[str, _Span]]:
    """The tensors of a matrix, none of a vector, and which of its rows they are."""
    if len(shape) < 2:
        return
    *experts, rows, cols = shape
    matrix = Matrix(slices, rows, cols, math.prod(experts), role.removesuffix(".weight"))
    at = 0
    for part in slices:
        start = part.start
        while start < part.stop:
            expert, first = divmod(at, rows)
            count = min(rows - first, part.stop - start)
            yield part.tensor, _Span(start, start + count, matrix, expert, first)
            start, at = start + count, at + count


def _set_vector(
    role: str, shapes: Shapes, names: Names, store: WeightStore, tensors: dict[str, Tensor]
) -> None:
    values, at = store.vector(Vector(names[role], shapes[role][0], role=role)), 0
    for part in names[role]:
        t, size = tensors[part.tensor], part.stop - part.start
        whole = t.to_float32().reshape(-1)
        whole[part.start : part.stop] = values[at : at + size]
        tensors[part.tensor] = ByteTensor(
            t.name, t.format, t.shape, FORMATS[t.format].quantize(whole)
        )
        at += size


def _untied(metadata: Mapping[str, Field]) -> dict[str, Field]:
    """A configuration whose head has its own weights, also where it is within another."""
    inner = {
        k: _untied(v) for k, v in metadata.items() if k == "text_config" and isinstance(v, dict)
    }
    return {**metadata, **inner, "tie_word_embeddings": False}
