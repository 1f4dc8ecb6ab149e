"""Where the parts of a model that makes pictures are: in its folder, or on the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from squall.checkpoints import UQFF, Checkpoint, open_checkpoint, open_file
from squall.checkpoints.hub import Hub, is_id
from squall.errors import (
    InvalidRequest,
    ModelNotFound,
    SquallError,
    UnsupportedModel,
)
from squall.files import quote, read_json
from squall.locate import only_uqff
from squall.names import resolve
from squall.opening import Opening

INDEX = "model_index.json"
PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
_LONE = re.compile(r"flux\d.*\.safetensors", re.IGNORECASE)
# What the header of a GGUF file of FLUX has near its beginning: a key, a string's type and length,
# the string. All of a header takes long to read, where there is a vocabulary.
_FLUX_GGUF = b"general.architecture\x08\0\0\0\x04\0\0\0\0\0\0\0flux"
_HEAD_BYTES = 1 << 16
# Where mistral.rs takes from what a repository lacks.
T5, CLIP = "EricB/t5-v1_1-xxl-enc-only", "openai/clip-vit-large-patch14"
T5_TOKENS = "EricB/t5_tokenizer:t5-v1_1-xxl.tokenizer.json"
CLIP_TOKENS = f"{CLIP}:tokenizer.json"


@dataclass(frozen=True, slots=True)
class Files:
    """The parts of a model, each a file or a folder; path: what was opened."""

    path: Path
    transformer: Path
    vae: Path
    t5: Path
    clip: Path
    t5_tokens: Path
    clip_tokens: Path
    scheduler: Path


def is_image_model(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is a model that makes pictures."""
    found = Path(os.path.expanduser(path))
    try:
        if found.is_dir():
            kind = (read_json(found / INDEX) or {}).get("_class_name")
            return str(kind).startswith("Flux") or bool(_lone(found))
        if found.suffix == ".gguf" and found.is_file():
            with found.open("rb") as file:
                return _FLUX_GGUF in file.read(_HEAD_BYTES)
    except (SquallError, OSError):
        return False
    return found.is_file() and _LONE.fullmatch(found.name) is not None


def find(opening: Opening) -> Files:
    """All parts, from where the opening, the model's folder or mistral.rs has them.

    Raises ModelNotFound for what is nowhere, and UnsupportedModel for other pipelines.
    """
    path = _located(opening)
    folder = path if path.is_dir() else path.parent
    _check_pipeline(folder)
    hub = replace(opening.hub or Hub(), revision="main")  # what is named is of the model alone

    def part(given: str | os.PathLike[str] | None, *places: str) -> Path | None:
        if given is not None:
            return _there(hub.path(given), given)
        found = (folder / place for place in places)
        return next((place for place in found if place.is_file() or _weighs(place)), None)

    vae = part(opening.vae, "vae", "ae.safetensors")
    if vae is None:
        raise ModelNotFound(
            f"{str(folder)!r} has no autoencoder: neither vae/ nor ae.safetensors; name one (--vae)"
        )
    t5 = part(opening.t5, "text_encoder_2") or hub.fetch(T5, opening.progress)
    clip = part(opening.clip, "text_encoder") or hub.fetch(CLIP, opening.progress)
    t5_tokens = _tokens(t5, folder / "tokenizer_2") or hub.fetch(T5_TOKENS)
    clip_tokens = _tokens(clip, folder / "tokenizer") or hub.fetch(CLIP_TOKENS)
    transformer = path if path.is_file() else _transformer(folder)
    scheduler = folder / "scheduler/scheduler_config.json"
    return Files(path, transformer, vae, t5, clip, t5_tokens, clip_tokens, scheduler)


def open_part(path: Path) -> Checkpoint:
    """One part of a model."""
    if path.is_dir():
        return open_checkpoint(only_uqff(path) or path)
    return open_file(path) if path.suffix == ".safetensors" else open_checkpoint(path)


def _located(opening: Opening) -> Path:
    if opening.path is None:
        raise InvalidRequest("name a model that makes pictures, such as the folder of FLUX.1")
    path = Path(os.path.expanduser(opening.path))
    if path.exists():
        return path
    if not is_id(name := resolve(str(opening.path))):
        return _there(path, opening.path)
    given = {"text_encoder_2": opening.t5, "text_encoder": opening.clip, "vae": opening.vae}
    skipped = tuple(f"{name}/" for name, other in given.items() if other is not None)
    return (opening.hub or Hub()).fetch(name, opening.progress, skip=skipped)


def _there(path: Path, name: object) -> Path:
    if not path.exists():
        raise ModelNotFound(f"{str(name)!r} does not exist, and is no model of the hub")
    return path


def _check_pipeline(folder: Path) -> None:
    index = read_json(folder / INDEX)
    if index is not None and index.get("_class_name") not in PIPELINES:
        raise UnsupportedModel(
            f"{INDEX} is of {quote(str(index.get('_class_name')))}; known: {', '.join(PIPELINES)}"
        )


def _transformer(folder: Path) -> Path:
    if _weighs(folder / "transformer"):
        return folder / "transformer"
    found = _lone(folder)
    if len(found) != 1:
        listed = ": " + ", ".join(file.name for file in found) if found else ""
        raise ModelNotFound(
            f"{str(folder)!r} has no transformer/ and {len(found)} files such as "
            f"flux1-dev.safetensors{listed}; name one"
        )
    return found[0]


def _lone(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _LONE.fullmatch(file.name))


def _weighs(folder: Path) -> bool:
    endings = (".safetensors", ".bin", UQFF)
    return folder.is_dir() and any(file.suffix in endings for file in folder.iterdir())


def _tokens(part: Path, folder: Path) -> Path | None:
    """Of a part with a tokenizer of its own that, or else that of a folder, if it has one."""
    if part.suffix == ".gguf":
        return part
    for place in (part, folder):
        names = ("tokenizer.json", "vocab.json")
        if any((place / name).is_file() for name in names):
            return place
    return None
