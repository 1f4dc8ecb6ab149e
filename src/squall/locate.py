"""Which file is meant: a GGUF file, a folder with one, a model of the hub, or the default."""

from __future__ import annotations

import os
import re
from pathlib import Path

from squall.checkpoints.hub import Hub, Progress, is_id
from squall.errors import ModelNotFound

_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


def locate(
    path: str | os.PathLike[str] | None,
    hub: Hub | None = None,
    progress: Progress | None = None,
) -> Path:
    """The GGUF file to open; of a split file its first part.

    What is here wins over a model of the hub, which is `owner/name` or `owner/name:file`.
    """
    if path is None:
        # Imported here because importlib.metadata is slow, and needed for the default model only.
        from squall import embedded

        return embedded.find()
    chosen = Path(path).expanduser()
    if chosen.is_dir():
        return _only_file(chosen)
    if chosen.is_file():
        return chosen
    if not is_id(str(path)):
        raise ModelNotFound(
            f"{str(path)!r} does not exist; name a GGUF file, a folder with one, or a model of the "
            "hub as owner/name or owner/name:file"
        )
    fetched = (hub or Hub()).fetch(str(path), progress)
    return _only_file(fetched) if fetched.is_dir() else fetched


def _only_file(folder: Path) -> Path:
    found = sorted(file for file in folder.iterdir() if file.suffix == ".gguf")
    models = [
        file for file in found if (part := _PART.search(file.name)) is None or part[1] == "00001"
    ]
    if not models:
        raise ModelNotFound(
            f"{folder} has no GGUF file; Squall reads GGUF. Name a file with the ending .gguf."
        )
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise ModelNotFound(f"{folder} has {len(models)} models; name one of them: {names}")
    return models[0]
