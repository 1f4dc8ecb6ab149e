"""Short names of models, such as smollm2:1.7b: what they mean, and which models are here.

names.toml has those that Squall knows; the user's models.toml adds to them.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from squall import embedded
from squall.checkpoints.hub import (
    Hub,
    Judge,
    Progress,
    choose,
    files_in,
    id_of,
    is_id,
    is_mmproj,
    parts_of,
    snapshot,
)
from squall.errors import InvalidRequest, ModelNotFound
from squall.files import quote, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = "default"
MOST_BYTES = 1 << 20
MOST_HOPS = 8  # from alias to alias
HOW = (
    "Name a GGUF file, the folder of a model, a model of the hub as owner/name or owner/name:file, "
    "or a short name such as smollm2:1.7b"
)
_FORMATS = {".gguf": "gguf", ".uqff": "uqff", ".safetensors": "safetensors"}
_WEIGHTS = (*_FORMATS, ".bin")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(:[a-z0-9][a-z0-9._-]{0,63})?")
# As in smollm2:1.7b-instruct-q8_0: another file of the same repository.
_TAGGED = re.compile(r"(.+:.+?)(?:-instruct)?(?:-((?:i?q\d|b?f16|f32)\w*))?")
# As web pages and Ollama name models of the hub, and files of them.
_ADDRESS = re.compile(
    r"(?:https://)?(?:hf|huggingface)\.co/([^/]+/[^/]+?)(?:/(?:blob|resolve)/main/([^?]+)|/tree/main)?"
    r"/?(?:\?.*)?"
)
_WEIGHED = re.compile(r"i?q\d\w*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Installed:
    """A model that is here. name: as commands take it; files: its own, within the repository."""

    name: str
    path: Path
    bytes: int
    modified: float
    format: str
    files: tuple[str, ...] = ()


def table() -> Path:
    """Where the user's own names are."""
    return embedded.user_folder("XDG_CONFIG_HOME", ".config") / "models.toml"


def known() -> Mapping[str, str]:
    """All short names; a value is a path, `owner/name`, `owner/name:file` or a short name."""
    return _builtin() | _own()


@cache
def _builtin() -> dict[str, str]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _own() -> dict[str, str]:
    """The user's table; raises InvalidRequest with what is wrong in it."""
    path = table()
    text = read_text(path, MOST_BYTES)
    try:
        found = tomllib.loads(text or "")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path} is not TOML: {error}") from None
    for name, value in found.items():
        if not _NAME.fullmatch(name) or name == DEFAULT:
            raise InvalidRequest(
                f"{path}: {quote(name)} is no short name; it must be lower-case letters, digits, "
                "'.', '-' and '_', with one ':' at most"
            )
        if not isinstance(value, str) or not (
            value in found or value in _builtin() or is_id(value) or _is_path(value)
        ):
            raise InvalidRequest(
                f"{path}: {name} is {quote(str(value))}; it must be an absolute path or one "
                "from ~, owner/name, owner/name:file, or another short name, in quotes"
            )
    return found


def _is_path(value: str) -> bool:
    return os.path.isabs(os.path.expanduser(value)) and value.isprintable()


def resolve(word: str) -> str:
    """What a word means: a short name's path or `owner/name:file`; other words as they are."""
    found = _found(word)
    if found is None:
        address = _ADDRESS.fullmatch(word)
        return ":".join(filter(None, address.groups())) if address else word
    name, kind, names = *found, known()
    for _ in range(MOST_HOPS):
        if name not in names:
            return name if kind is None else _weighed(name, kind)
        name = names[name]
    raise InvalidRequest(f"{table()}: {word} stands for itself")


def is_name(word: str) -> bool:
    """Whether a word is a short name, one of a known family, mistyped, or an address of the hub."""
    family, colon, _ = word.lower().partition(":")
    named = word == DEFAULT or _ADDRESS.fullmatch(word) or _found(word)
    return bool(named) or (colon != "" and family in known())


def near(word: str) -> str:
    """What a word that is no model may have meant, as a sentence; or nothing."""
    close = difflib.get_close_matches(word.lower(), known().keys() - {word.lower()}, 3)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _found(word: str) -> tuple[str, str | None] | None:
    """The short name that a word is, and the number format that it asks for."""
    name = word.lower().removesuffix(":latest")
    if not _NAME.fullmatch(name):
        return None
    names = known()
    if name in names:
        return name, None
    tagged = _TAGGED.fullmatch(name)
    return (tagged[1], tagged[2]) if tagged and tagged[1] in names else None


def _weighed(value: str, kind: str) -> str:
    """The same model in another number format."""
    id, colon, file = value.partition(":")
    if not colon or not is_id(value):
        raise ModelNotFound(f"{value} is in one number format; name it without {kind}")
    return f"{id}:{_WEIGHED.sub(kind, file)}"


def pull(
    name: str, hub: Hub | None = None, progress: Progress | None = None, judge: Judge | None = None
) -> Path:
    """Download what is not here of a model of the hub, as `Hub.fetch` does; its file or folder."""
    id = resolve(name)
    if not is_id(id):
        raise ModelNotFound(f"{quote(name)} is no model of the hub. {near(name)}{HOW}")
    return (hub or Hub()).fetch(id, progress, judge, mmproj=True)


def installed() -> list[Installed]:
    """The models that are here, by name: the default, the user's and those of the hub's cache."""
    found = [*_of_paths(), *_of_hub()]
    return sorted(found, key=lambda model: model.name.lower())


def find(name: str) -> Installed:
    """The model that a name means, which is here."""
    id = resolve(name)
    meant = {name, os.path.expanduser(id)}
    if is_id(id):
        with suppress(ModelNotFound):
            meant.add(str(Hub(offline=True).fetch(id)))
    for model in installed():
        if meant & {model.name, str(model.path)}:
            return model
    how = f"squall pull {name} gets it" if is_id(id) else f"{near(name)}squall list tells what is"
    raise ModelNotFound(f"{quote(name)} is not here. {how}")


def _of_paths() -> Iterator[Installed]:
    default = embedded.installed()
    paths = {} if default is None else {DEFAULT: default}
    paths |= {name: Path(value).expanduser() for name, value in _own().items() if _is_path(value)}
    for name, path in paths.items():
        files = path.iterdir() if path.is_dir() else [path]
        if path.exists():
            yield _installed(name, path, filter(Path.is_file, files))


def _of_hub() -> Iterator[Installed]:
    from huggingface_hub import constants

    for repository in Path(constants.HF_HUB_CACHE).glob("models--*--*"):
        id = id_of(repository)
        folder = snapshot(repository, "main")
        if not is_id(id) or folder is None:
            continue
        names = files_in(folder)
        whole = [name for name in names if name.endswith(".gguf") and not is_mmproj(name)]
        for wanted in ("", *whole):
            if files := _of_model(names, wanted):
                paths = [folder / file for file in files]
                path, name = (folder / wanted, f"{id}:{wanted}") if wanted else (folder, id)
                yield replace(_installed(_short(id, wanted) or name, path, paths), files=files)


def _of_model(names: Collection[str], wanted: str) -> tuple[str, ...]:
    """The files of one model of a repository, of a folder if `wanted` is empty; none in part."""
    try:
        files, main = choose(names, wanted, mmproj=True)
    except ModelNotFound:
        return ()
    whole = all(part in names for file in files for part in parts_of(file))
    return tuple(files) if whole and (main or "") == wanted else ()


def _short(id: str, file: str) -> str | None:
    """The short name of a model of the hub."""
    for name, value in known().items():
        of, _, part = value.partition(":")
        if of == id and (part.lower() in file.lower() if file else not part):
            return name
    return None


def _installed(name: str, path: Path, files: Iterable[Path]) -> Installed:
    found = [*files]
    stats, endings = [file.stat() for file in found], {file.suffix for file in found}
    kind = next((kind for ending, kind in _FORMATS.items() if ending in endings), "pytorch")
    modified = max((stat.st_mtime for stat in stats), default=0.0)
    return Installed(name, path, sum(stat.st_size for stat in stats), modified, kind)


def remove(model: Installed) -> int:
    """Remove a model from the hub's cache, by the hub's library; how many bytes became free.

    What other models of its repository have stays.
    """
    from huggingface_hub import constants, scan_cache_dir

    root = Path(constants.HF_HUB_CACHE)
    if not model.files or not model.path.is_relative_to(root):
        how = (
            f"pip uninstall {embedded.DISTRIBUTION}" if model.name == DEFAULT else "remove it there"
        )
        raise InvalidRequest(f"{model.name} is {model.path}, outside of the hub's cache; {how}")
    folder = root / model.path.relative_to(root).parts[0]
    scanned = scan_cache_dir(root)
    repository = next(found for found in scanned.repos if found.repo_path.name == folder.name)
    # Of it alone: copies of a repository have its commits.
    scanned = replace(scanned, repos=frozenset((repository,)))
    files = {
        file: file.file_path.relative_to(revision.snapshot_path).as_posix()
        for revision in repository.revisions
        for file in revision.files
    }
    if any(name.endswith(_WEIGHTS) and name not in model.files for name in files.values()):
        own = {name for name in model.files if not is_mmproj(name)}  # which others may have, too
        plan = scanned.delete_files(*(file for file, name in files.items() if name in own))
    else:
        plan = scanned.delete_revisions(*(r.commit_hash for r in repository.revisions))
    for place in (folder.resolve(), *plan.blobs):
        if not place.is_relative_to(root.resolve()):
            raise InvalidRequest(f"{place} is outside of the hub's cache; nothing was removed")
    plan.execute()
    return plan.expected_freed_size
