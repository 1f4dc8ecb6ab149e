"""A model as a folder: config.json and weights, in safetensors files or in PyTorch's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from squall.checkpoints.base import Checkpoint, Tensor
from squall.checkpoints.pickle import INDEX as PICKLE_INDEX
from squall.checkpoints.pickle import open_pickle, open_pickles
from squall.checkpoints.quantized import quantization, with_weights
from squall.checkpoints.safetensors import MAX_TENSORS, Part, open_part
from squall.errors import InvalidCheckpoint, ModelNotFound, UnsupportedModel
from squall.files import quote, read_json
from squall.quant.scheme import Scheme

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_PARTS = 1024
_SHARD = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")
_PICKLE = re.compile(r"pytorch_model\.(bin|pth|pt)")
_PICKLE_SHARD = re.compile(r"pytorch_model-([0-9]{5})-of-([0-9]{5})\.(bin|pth|pt)")
# No separators, no leading dot: a name that stays in the folder.
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}\.safetensors")


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder with config.json and weights; no weight is read."""
    return _open(folder, quantization(folder, _config(folder)))


def _open(folder: Path, scheme: Scheme | None) -> Checkpoint:
    config = _config(folder)
    tensors, parts = _open_safetensors(folder) or _open_pickles(folder)
    if scheme is not None:
        tensors = with_weights(tensors, scheme)
    return Checkpoint(
        folder,
        MappingProxyType(config),
        MappingProxyType(tensors),
        sum(part.stat().st_size for part in parts),
        parts=tuple(parts),
        kind="folder",
        quantization="" if scheme is None else str(scheme),
    )


def read_folder(folder: Path) -> Checkpoint:
    """The same, with the tensors of an unknown quantization as they are stored."""
    try:
        return open_folder(folder)
    except UnsupportedModel:
        return _open(folder, None)


def _config(folder: Path) -> dict[str, Any]:
    found = read_json(folder / CONFIG)
    if found is None:
        raise ModelNotFound(f"{str(folder)!r} has neither a GGUF file nor {CONFIG}")
    return found


def _open_safetensors(folder: Path) -> tuple[dict[str, Tensor], list[Path]] | None:
    """The tensors and their files; None where there are no such files."""
    weights: dict[str, str] = {}
    if (folder / WHOLE).is_file():
        names = [WHOLE]
    elif (index := read_json(folder / INDEX)) is not None:
        weights = _weight_map(index)
        names = sorted(set(weights.values()))
    else:
        names = _set(folder, _SHARD)
    if not names:
        return None
    parts = [open_part(folder / name) for name in names]
    _check_index(weights, parts)
    tensors = _joined((part.path.name, part.tensors()) for part in parts)
    return tensors, [part.path for part in parts]


def _open_pickles(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    weight_map = read_json(folder / PICKLE_INDEX)
    if weight_map is not None:
        tensors = open_pickles(folder, weight_map)
        return tensors, [folder / name for name in sorted(set(weight_map["weight_map"].values()))]
    whole = [file.name for file in folder.iterdir() if _PICKLE.fullmatch(file.name)]
    names = sorted(whole)[:1] or _set(folder, _PICKLE_SHARD)
    if not names:
        raise ModelNotFound(
            f"{str(folder)!r} has {CONFIG} but no weights: {WHOLE}, or model-00001-of-0000N and so "
            "on, or the same as pytorch_model.bin"
        )
    found = ((name, open_pickle(folder / name).values()) for name in names)
    return _joined(found), [folder / name for name in names]


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    """Tensor -> file; a file's name may not lead out of the folder."""
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InvalidCheckpoint(f"{INDEX} has no weight_map")
    for name in weights.values():
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise InvalidCheckpoint(
                f"{INDEX} names the file {quote(str(name))}; "
                "only plain names of .safetensors files in the folder may be"
            )
    if len(set(weights.values())) > MAX_PARTS:
        raise InvalidCheckpoint(f"{INDEX} names more than {MAX_PARTS} files")
    return weights


def _check_index(weights: dict[str, str], parts: Sequence[Part]) -> None:
    found = {(part.path.name, entry.name) for part in parts for entry in part.entries}
    missing = [(file, name) for name, file in weights.items() if (file, name) not in found]
    if missing:
        file, name = missing[0]
        raise InvalidCheckpoint(f"{INDEX} says that {quote(name)} is in {quote(file)}; it is not")


def _set(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    """The names of a complete set without an index; none where there is none."""
    matches = [m for file in folder.iterdir() if (m := pattern.fullmatch(file.name))]
    counts = {int(match[2]) for match in matches}
    numbers = sorted(int(match[1]) for match in matches)
    if matches and (len(counts) > 1 or numbers != list(range(1, min(counts) + 1))):
        raise InvalidCheckpoint(
            f"the folder has parts {numbers[:20]} of a model in "
            f"{' or '.join(map(str, sorted(counts)))} parts"
        )
    return sorted(match.string for match in matches)


def _joined(files: Iterable[tuple[str, Iterable[Tensor]]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for file, found in files:
        for tensor in found:
            if tensor.name in owner:
                raise InvalidCheckpoint(
                    f"tensor {quote(tensor.name)} is in {quote(owner[tensor.name])} and in "
                    f"{quote(file)}"
                )
            tensors[tensor.name], owner[tensor.name] = tensor, file
    if len(owner) > MAX_TENSORS:
        raise InvalidCheckpoint(f"the files hold {len(owner)} tensors; the limit is {MAX_TENSORS}")
    return tensors
