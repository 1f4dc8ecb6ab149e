"""Models with adapters in their weights, as if they were stored so; and written as folders."""

from __future__ import annotations

import json
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
from squall.program import Matrix, Slice, Vector
from squall.quant import FORMATS
from squall.recipes import Recipe
from squall.weights import Progress, WeightStore

if TYPE_CHECKING:
    from squall.adapters.lora import Lora

WEIGHTS = "model.safetensors"
_BESIDE = (".json", ".jinja", ".model", ".txt")
# Rows of a tensor, from and to; of which matrix and expert they are, and from which row on.
_Span = tuple[int, int, Matrix, int, int]


@dataclass(frozen=True, eq=False)
class _Merged(Tensor):
    name: str
    format: str
    shape: tuple[int, ...]
    store: WeightStore
    spans: tuple[_Span, ...]

    def row_data(self, start: int, stop: int) -> NDArray[np.uint8]:
        parts = []
        for begin, end, matrix, expert, first in self.spans:
            low, high = max(start, begin), min(stop, end)
            if low < high:
                rows = self.store.rows(matrix, expert).data.reshape(matrix.rows, -1)
                parts.append(rows[low - begin + first : high - begin + first].reshape(-1))
        return np.concatenate(parts)


def merged(
    checkpoint: Checkpoint, recipe: Recipe, loras: Sequence[tuple[Lora, float]]
) -> tuple[Checkpoint, Recipe]:
    """A model with the sum of adapters, each with its weight, in its weights.

    A head that shares the table of embeddings gets a tensor of its own if one of the two changes.
    """
    # Slow to import.
    from squall.adapters.lora import merged_terms, merged_vectors
    from squall.adapters.target import Target

    terms, vectors = merged_terms(loras), merged_vectors(loras)
    store = WeightStore(checkpoint, merged=terms, vectors=vectors)
    target, part = Target.of(checkpoint, recipe), recipe.part("decoder")
    spec, names, metadata = recipe.decoder, dict(part.names), dict(checkpoint.metadata)
    tensors = dict(checkpoint.tensors)
    if spec.tied and terms.keys() & {("embed", 0), ("head", 0)}:
        own, spec, metadata = (
            part.naming.name("head.weight"),
            replace(spec, tied=False),
            metadata if checkpoint.kind == "gguf" else _untied(metadata),
        )
        (table,) = names["embed.weight"]
        names["head.weight"], tensors[own] = (replace(table, tensor=own),), tensors[table.tensor]
    spans: dict[str, list[_Span]] = {}
    places = {**recipe.all_names, **names}
    for role, slices in places.items():
        if (matrix := target.matrix(role.removesuffix(".weight"))) is not None:
            for tensor, span in _spans(matrix, slices):
                spans.setdefault(tensor, []).append(span)
    changed = {role for role, _ in terms} | {"head"}
    for name, found in spans.items():
        if changed & {matrix.role for _, _, matrix, _, _ in found}:
            t = tensors[name]
            tensors[name] = _Merged(name, t.format, t.shape, store, tuple(found))
    biases = {
        f"{role}.bias" for (role, _), found in terms.items() for t in found if t.bias is not None
    }
    for role in (*vectors, *biases):
        values, at = store.vector(Vector(places[role], target.shapes[role][0], role=role)), 0
        for piece in places[role]:
            t, size = tensors[piece.tensor], piece.stop - piece.start
            flat = t.to_float32().reshape(-1)
            flat[piece.start : piece.stop] = values[at : at + size]
            data, at = FORMATS[t.format].quantize(flat), at + size
            tensors[piece.tensor] = ByteTensor(t.name, t.format, t.shape, data)
    made = replace(part, spec=spec, names=MappingProxyType(names))
    edited = replace(checkpoint, tensors=MappingProxyType(tensors), metadata=metadata)
    others = (other for other in recipe.parts if other is not part)
    return edited, replace(recipe, parts=(made, *others))


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
        items = _items(edited.tensors, progress)
        write_safetensors(temporary / WEIGHTS, items, force=False, metadata={"format": "pt"})
        os.replace(temporary, folder)
    except OSError as error:
        raise InvalidRequest(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _items(tensors: Mapping[str, Tensor], progress: Progress | None) -> list[Item]:
    done, whole = 0, sum(t.nbytes for t in tensors.values())

    def data(tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        nonlocal done
        yield tensor.data
        done += tensor.nbytes
        if progress is not None:
            progress(done, whole)

    return [Item(n, t.format, t.shape, Part(t.nbytes, data(t))) for n, t in tensors.items()]


def _spans(matrix: Matrix, slices: tuple[Slice, ...]) -> Iterator[tuple[str, _Span]]:
    """The tensors that a matrix is in, and as which of its rows."""
    at = 0
    for part in slices:
        start = part.start
        while start < part.stop:
            expert, first = divmod(at, matrix.rows)
            stop = min(start + matrix.rows - first, part.stop)
            yield part.tensor, (start, stop, matrix, expert, first)
            start, at = stop, at + stop - start


def _untied(metadata: Mapping[str, Field]) -> dict[str, Field]:
    """A configuration whose head has its own weights, also where it is within another."""
    inner = {
        k: _untied(v) for k, v in metadata.items() if k == "text_config" and isinstance(v, dict)
    }
    return {**metadata, **inner, "tie_word_embeddings": False}
