"""Which file is meant: a GGUF file, a folder with one, or, with nothing named, the default."""

from __future__ import annotations

import os
import re
from pathlib import Path

from squall.errors import ModelNotFound

_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:\S+)?")


def locate(path: str | os.PathLike[str] | None) -> Path:
    """The GGUF file to open; of a split file its first part."""
    if path is None:
        # Imported here because importlib.metadata is slow, and needed for the default model only.
        from squall import embedded

        return embedded.find()
    chosen = Path(path).expanduser()
    if chosen.is_dir():
        return _only_file(chosen)
    if chosen.is_file():
        return chosen
    raise ModelNotFound(_advice(str(path)))


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


def _advice(path: str) -> str:
    if _HUB_ID.fullmatch(path) and not path.endswith(".gguf"):
        return (
            f"{path!r} is not a folder here, and Squall does not download from a model hub yet. "
            "Download a GGUF file of the model, then name it with -f FILE."
        )
    return f"{path!r} does not exist; name a GGUF file, or a folder with one"
