"""What is meant: a GGUF file, a folder, a model of the hub, a short name, or the default."""

from __future__ import annotations

import os
import re
from pathlib import Path

from squall import embedded
from squall.checkpoints import UQFF
from squall.checkpoints.hub import Hub, Judge, Progress, folder_weights, is_id, is_mmproj
from squall.errors import ModelNotFound
from squall.names import DEFAULT, HOW, is_name, near, resolve

_ENDINGS = (".gguf", ".ggml", ".uqff", ".safetensors")
# With letters on both sides, unlike 24/7.
_NAMES = re.compile(r"[^/]*[A-Za-z][^/]*/[^/]*[A-Za-z]")
_PART = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


def locate(
    path: str | os.PathLike[str] | None,
    hub: Hub | None = None,
    progress: Progress | None = None,
    judge: Judge | None = None,
    *,
    mmproj: bool = True,
) -> Path:
    """What to open: a GGUF file, of a split one the first part, or a folder with config.json.

    Of a folder that has both kinds, its safetensors or PyTorch weights, as of a model of the hub.

    What is here wins over short names and models of the hub, `owner/name` or `owner/name:file`;
    `judge` may refuse one before it is downloaded. mmproj: of GGUF models there the towers, too.
    """
    if path is not None and not os.path.exists(os.path.expanduser(path)):
        path = resolve(str(path))
    if path is None or path == DEFAULT:
        return embedded.find()
    chosen = Path(os.path.expanduser(path))
    if chosen.is_dir():
        return _in_folder(chosen)
    if chosen.is_file():
        return chosen
    if not is_id(str(path)):
        raise ModelNotFound(f"{str(path)!r} does not exist. {near(str(path))}{HOW}")
    fetched = (hub or Hub()).fetch(str(path), progress, judge, mmproj=mmproj)
    return _in_folder(fetched) if fetched.is_dir() else fetched


def looks_like_model(word: str) -> bool:
    """Whether a word of a command line means a model, and not a prompt.

    It does if it is a file or a folder here, could be one or an id of the hub alone, or is a short
    name.
    """
    if os.path.exists(os.path.expanduser(word)) or is_name(word):
        return True
    path = word.endswith(_ENDINGS) or (word[:1] in "./~" and "/" in word)
    return len(word.split()) == 1 and (path or (is_id(word) and _NAMES.match(word) is not None))


def _in_folder(folder: Path) -> Path:
    names = [file.name for file in folder.iterdir()]
    found = sorted(folder / name for name in names if name.endswith(".gguf"))
    found = [file for file in found if not is_mmproj(file.name)] or found
    models = [
        file for file in found if (part := _PART.search(file.name)) is None or part[1] == "00001"
    ]
    if "config.json" in names and (folder_weights(names) or not models):
        return only_uqff(folder) or folder
    if "adapter_config.json" in names and not models:
        raise ModelNotFound(
            f"{folder} is a LoRA adapter: open the model that it is for, with --adapter {folder}"
        )
    if not models:
        raise ModelNotFound(
            f"{folder} has no GGUF file and no config.json; "
            "name a file with the ending .gguf, or a folder as transformers saves it"
        )
    if len(models) > 1:
        choice = ", ".join(file.name for file in models)
        raise ModelNotFound(f"{folder} has {len(models)} models; name one of them: {choice}")
    return models[0]


def find_mmproj(
    text: Path, wanted: str | os.PathLike[str] | None, hub: Hub | None, progress: Progress | None
) -> list[Path]:
    """The towers for a GGUF model: the file that is named, or those beside it."""
    if wanted is not None:
        return [locate(wanted, hub, progress)]
    if is_mmproj(text.name):
        return []
    return sorted(file for file in text.parent.glob("*.gguf") if is_mmproj(file.name))


def locate_uqff(path: Path, name: str | os.PathLike[str]) -> Path:
    """A UQFF file by its path, or by its name in the folder of a model."""
    inside = (path if path.is_dir() else path.parent) / name
    found = inside if inside.is_file() else Path(name).expanduser()
    if found.suffix != UQFF or not found.is_file():
        raise ModelNotFound(f"there is no UQFF file {str(name)!r}, and none in {str(path)!r}")
    return found


def only_uqff(folder: Path) -> Path | None:
    """The UQFF file of a folder whose other weights are what the file does not hold."""
    found = sorted(folder.iterdir())
    weights = [f.name for f in found if f.suffix in (".safetensors", ".bin", ".pth", ".pt")]
    files = [file for file in found if file.suffix == UQFF]
    if not files or weights != ["residual.safetensors"]:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelNotFound(f"{folder} has {len(files)} UQFF files; name one of them: {names}")
    return files[0]
