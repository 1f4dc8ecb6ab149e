"""mistral.rs's ordering files: which adapters a model has, and the order that X-LoRA knows them in.

{"order": ["math", "code"], "base_model_id": "owner/name",
 "layers": {"model.layers.0.self_attn.q_proj": 0, ...},
 "preload_adapters": [{"name": "law", "adapter_model_id": "owner/name"}]}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound
from squall.files import quote, read_json

CONFIG = "adapter_config.json"
MOST_NAMES = 4096

_Kind = TypeVar("_Kind")


@dataclass(frozen=True, slots=True)
class Ordering:
    """What such a file says; every part may be missing.

    order: names of adapters. layers: of X-LoRA, the index that scalings have for a module.
    preload: more adapters, by name, and the folder or repository of each.
    """

    order: tuple[str, ...] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    base_model_id: str | None = None
    preload: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str] | None) -> Ordering:
        """Of a file; without one nothing is said. Raises where something else stands in it."""
        if path is None:
            return cls()
        file = Path(path).expanduser()
        if (given := read_json(file)) is None:
            raise ModelNotFound(f"there is no ordering file {str(path)!r}")
        listed = _get(given, "preload_adapters", list) or []
        pairs = [(_get(item, "name", str), _get(item, "adapter_model_id", str)) for item in listed]
        names = _get(given, "order", list) or []
        layers = _get(given, "layers", dict) or {}
        if not all(isinstance(name, str) and name for name in [*names, *sum(pairs, ())]):
            raise InvalidCheckpoint(f"{quote(file.name)}: adapters have names, which are texts")
        known = [*names, *(name for name, _ in pairs)]
        if len(set(known)) < len(known) or len(known) > MOST_NAMES:
            raise InvalidCheckpoint(
                f"{quote(file.name)} names {len(known)} adapters; it may {MOST_NAMES}, each once"
            )
        if not all(type(index) is int and index >= 0 for index in layers.values()):
            raise InvalidCheckpoint(f"{quote(file.name)}: indices of layers are numbers from 0 on")
        base = _get(given, "base_model_id", str)
        return cls(tuple(names), layers, base, {str(name): str(of) for name, of in pairs})

    def check_base(self, model: str | None) -> None:
        """Raises InvalidRequest for an id that is not the file's; a folder may have any name."""
        wanted = self.base_model_id
        if wanted is None or model is None or os.path.exists(model):
            return
        if _last(wanted) != _last(model):
            raise InvalidRequest(
                f"the ordering file is for {quote(wanted)}, not for {quote(model)}: open that one, "
                "or mend base_model_id in the file"
            )

    def places(self, repository: str) -> dict[str, str]:
        """Where each adapter is, those of `preload` too.

        In a folder or repository it is the sub-folder whose name has the adapter's, or all of it.
        """
        if not self.order and not self.preload:
            return _all_of(repository)
        given = dict.fromkeys(self.order, repository) | dict(self.preload)
        return {name: place_of(name, path) for name, path in given.items()}


def _all_of(repository: str) -> dict[str, str]:
    """The adapters of a folder that has several, or one by the repository's name."""
    root = Path(repository).expanduser()
    found = sorted(file.parent for file in root.glob(f"*/{CONFIG}"))
    if found and not (root / CONFIG).is_file():
        return {path.name: str(path) for path in found}
    return {repository.rstrip("/").rpartition("/")[2]: repository}


def place_of(name: str, repository: str) -> str:
    """The folder of an adapter; `owner/name:adapter` where it is of the hub."""
    root = Path(repository).expanduser()
    if not root.is_dir():
        return repository if root.is_file() else f"{repository}:{name}"
    folders = sorted(file.parent for file in root.glob(f"*/{CONFIG}"))
    found = [path for path in folders if path.name == name]
    found = found or [path for path in folders if name in path.name]
    if not found and (root / CONFIG).is_file():
        found = [root]
    if len(found) != 1:
        names = ", ".join(quote(path.name) for path in folders[:40]) or "none"
        raise ModelNotFound(
            f"{len(found)} folders in {repository!r} have {quote(name)} in their names; the "
            f"folders of adapters there: {names}"
        )
    return str(found[0])


def _last(id: str) -> str:
    return id.rstrip("/").rpartition("/")[2].lower()


def _get(given: Any, key: str, kind: type[_Kind]) -> _Kind | None:
    value = given.get(key) if isinstance(given, dict) else given
    if isinstance(given, dict) and (value is None or isinstance(value, kind)):
        return value
    raise InvalidCheckpoint(
        f"{key} in the ordering file is {value!r:.99}; it must be a {kind.__name__}"
    )
