"""A model as a folder: config.json and weights, in safetensors files or in PyTorch's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from squall.checkpoints.base import Checkpoint, Tensor
from squall.checkpoints.pickle import open_pickle
from squall.checkpoints.quantized import quantization, with_weights
from squall.checkpoints.safetensors import MAX_TENSORS, open_part
from squall.errors import InvalidCheckpoint, ModelNotFound, UnsupportedModel
from squall.files import quote, read_json
from squall.quant.scheme import Scheme

CONFIG = "config.json"
MAX_PARTS = 512


@dataclass(frozen=True, slots=True)
class _Kind:
    """Files of weights: how one is opened, and the names of a whole one, a shard, any, the index.

    plain: no separators, no leading dot: a name that stays in the folder.
    uncounted: of shards that do not say how many there are.
    """

    read: Callable[[Path], Iterable[Tensor]]
    whole: re.Pattern[str]
    shard: re.Pattern[str]
    plain: re.Pattern[str]
    index: str
    uncounted: re.Pattern[str] = re.compile(r"(?!)")


def _safetensors(stem: str, uncounted: str = r"(?!)") -> _Kind:
    return _Kind(
        lambda path: open_part(path).tensors(),
        re.compile(rf"{stem}\.safetensors"),
        re.compile(rf"{stem}-([0-9]{{5}})-of-([0-9]{{5}})\.safetensors"),
        re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}\.safetensors"),
        f"{stem}.safetensors.index.json",
        re.compile(uncounted),
    )


# The first that a folder has counts.
_KINDS = (
    _safetensors("model", r"t5_xxl-shard-[0-9]\.safetensors"),  # as FLUX.1's T5 is on the hub
    _safetensors("diffusion_pytorch_model"),
    _Kind(
        lambda path: open_pickle(path).values(),
        re.compile(r"pytorch_model\.(bin|pth|pt)"),
        re.compile(r"pytorch_model-([0-9]{5})-of-([0-9]{5})\.(bin|pth|pt)"),
        re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.(bin|pt|pth)"),
        "pytorch_model.bin.index.json",
    ),
)


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder with config.json and weights; no weight is read."""
    return _open(folder, quantization(folder, _config(folder)))


def _open(folder: Path, scheme: Scheme | None) -> Checkpoint:
    config = _config(folder)
    tensors, parts = _weights(folder)
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


def open_file(path: Path) -> Checkpoint:
    """One safetensors file by itself, of which no config.json says anything."""
    part = open_part(path)
    tensors = {tensor.name: tensor for tensor in part.tensors()}
    return Checkpoint(path, {}, tensors, path.stat().st_size, parts=(path,), kind="folder")


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


def _weights(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    there = sorted(file.name for file in folder.iterdir())
    for kind in _KINDS:
        places: dict[str, str] = {}
        names = [name for name in there if kind.whole.fullmatch(name)][:1]
        if not names and (index := read_json(folder / kind.index)) is not None:
            places = _places(index, kind)
        names = names or sorted(set(places.values())) or _set(there, kind.shard)
        names = names or list(filter(kind.uncounted.fullmatch, there))
        if names:
            tensors = _joined(((name, kind.read(folder / name)) for name in names), places)
            missing = next((name for name in places if name not in tensors), None)
            if missing is not None:
                where = f"{quote(missing)} is in {quote(places[missing])}"
                raise InvalidCheckpoint(f"{kind.index} says that {where}; it is not")
            return tensors, [folder / name for name in names]
    raise ModelNotFound(
        f"{str(folder)!r} has {CONFIG} but no weights: model.safetensors, or "
        "model-00001-of-0000N and so on, or the same as pytorch_model.bin"
    )


def _places(index: dict[str, Any], kind: _Kind) -> dict[str, str]:
    """Tensor -> file; a file's name may not lead out of the folder."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InvalidCheckpoint(f"{kind.index} has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or not kind.plain.fullmatch(name):
            raise InvalidCheckpoint(
                f"{kind.index} names the file {quote(str(name))}; only plain names of files of its "
                "kind, without folders, may be"
            )
    if len(set(places.values())) > MAX_PARTS:
        raise InvalidCheckpoint(f"{kind.index} names more than {MAX_PARTS} files")
    return places


def _set(there: Iterable[str], pattern: re.Pattern[str]) -> list[str]:
    """The names of a complete set without an index; none where there is none."""
    matches = [match for name in there if (match := pattern.fullmatch(name))]
    counts = {int(match[2]) for match in matches}
    numbers = sorted(int(match[1]) for match in matches)
    if matches and (len(counts) > 1 or numbers != list(range(1, min(counts) + 1))):
        raise InvalidCheckpoint(
            f"the folder has parts {numbers[:20]} of a model in "
            f"{' or '.join(map(str, sorted(counts)))} parts"
        )
    return sorted(match.string for match in matches)


def _joined(
    files: Iterable[tuple[str, Iterable[Tensor]]], places: Mapping[str, str]
) -> dict[str, Tensor]:
    """The tensors of all files; one that an index has elsewhere does not count."""
    tensors: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for file, found in files:
        for tensor in found:
            name = tensor.name
            if places.get(name, file) != file:
                continue
            if name in owner:
                raise InvalidCheckpoint(
                    f"tensor {quote(name)} is in {quote(owner[name])} and in {quote(file)}"
                )
            tensors[name], owner[name] = tensor, file
    if len(owner) > MAX_TENSORS:
        raise InvalidCheckpoint(f"the files hold {len(owner)} tensors; the limit is {MAX_TENSORS}")
    return tensors
