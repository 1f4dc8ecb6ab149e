"""Several models for one server: the words of the command, or a TOML file.

keep_alive = "10m"        # for models that have none of their own; all keys but path are optional
[[model]]
path = "FOLDER"           # as in the command: a file, a folder, a short name or a model of the hub
name = "chat"             # for clients; by default the file's, or what was said
pinned = true             # loaded at the start, and never unloaded
context = 8192            # any option of the command or of `Opening` that is about a model
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.cli import options
from squall.cli.models import judge
from squall.cli.opening import SHARED, makes_pictures
from squall.cli.toml_selector import check_keys, read_root
from squall.errors import InvalidRequest, ModelNotFound
from squall.locate import locate
from squall.names import find, pull, remove
from squall.needs import Kind, needs
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.checkpoints.hub import Progress
    from squall.cli.serve import ServeFlags
    from squall.server.residence import Lazy

KINDS: dict[str, Kind] = {
    "text": "text", "vision": "text", "pictures": "pictures", "embeddings": "embeddings"
}  # fmt: skip
_OWN = frozenset(("path", "name", "kind", "pinned", "keep_alive"))
# Flags for the models of one command that are one model's in a file, beside options of `Opening`.
_FLAGS = frozenset((
    "adapter", "image_memory", "adapter_memory", "kv_memory", "kv_fraction", "kv_block", "max_seqs",
    "max_queue", "queue_timeout", "no_kv_cache", "prefix_cache_n", "prompt_batchsize", "revision",
))  # fmt: skip
_NOT = frozenset(("hub", "engine", "kv", "command", "progress", "memory_bytes", "xlora", "anymoe"))
_KNOWN = _OWN | _FLAGS | ({item.name for item in fields(Opening)} - _NOT)


@dataclass(frozen=True)
class Entry:
    """A model: its path, what it is called, and what else is said of it."""

    path: str
    name: str | None = None
    kind: str | None = None
    pinned: bool = False
    keep_alive: str | int | float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> list[Entry]:
    """The models of a file. Raises InvalidRequest with what is wrong, and what could be there."""
    root = read_root(path)
    check_keys(root, str(path), {"model", "keep_alive"}, {"model"})
    tables, kept = root["model"], root.get("keep_alive")
    if not isinstance(tables, list) or not tables:
        raise InvalidRequest(f"{path}: each model is a table [[model]]")
    return [_entry(table, f"[[model]] {n} of {path}", kept) for n, table in enumerate(tables, 1)]


def _entry(table: object, what: str, kept: Any) -> Entry:
    if not isinstance(table, dict):
        raise InvalidRequest(f"{what} is {table!r:.99}; it must be a table")
    check_keys(table, what, _KNOWN, {"path"})
    checked = {"path": str, "name": str, "kind": str, "pinned": bool}
    for key, kind in checked.items():
        if not isinstance(table.get(key, kind()), kind):
            must = "true or false" if kind is bool else "a text"
            raise InvalidRequest(f"{key} of {what} is {table[key]!r:.99}; it must be {must}")
    if table.get("kind", "text") not in KINDS:
        known = ", ".join(KINDS)
        raise InvalidRequest(f"kind of {what} is {table['kind']!r:.99}; known: {known}")
    own = {key: value for key, value in table.items() if key in _OWN}
    more = {key: value for key, value in table.items() if key not in _OWN}
    return Entry(**{"keep_alive": kept} | own, options=more)


def lazies(flags: ServeFlags, entries: Sequence[Entry]) -> dict[str, Lazy]:
    """The models by name, to be opened later; what is not here is fetched now.

    Raises what opening them would, as far as headers tell.
    """
    found: dict[str, Lazy] = {}
    for entry in entries:
        with options.progress(f"fetching {entry.path}") as shown:
            kind, opening = _opening(flags, entry)
            needs(kind, replace(opening, progress=shown), sys.maxsize)
        name = entry.name or _name(entry.path, opening)
        if name in found:
            raise InvalidRequest(
                f"two models are called {name!r}; give them names in a file (--models): name = ..."
            )
        found[name] = _lazy(flags, entry, kind, opening)
    return found


def _lazy(flags: ServeFlags, entry: Entry, kind: Kind, opening: Opening) -> Lazy:
    from squall.server.options import duration_s
    from squall.server.residence import Lazy

    kept = flags.keep_alive if entry.keep_alive is None else entry.keep_alive
    return Lazy(kind, opening, entry.pinned, duration_s(kept), flags.preload)


def _opening(flags: ServeFlags, entry: Entry) -> tuple[Kind, Opening]:
    """What a model is, and how it is opened."""
    given = {key: value for key, value in entry.options.items() if key in _FLAGS}
    own = {key: value for key, value in entry.options.items() if key not in _FLAGS}
    flags = replace(flags, file=None, model=None, **given)
    kind = KINDS.get(entry.kind or "")
    if kind == "pictures" or (kind is None and makes_pictures(entry.path)):
        return "pictures", Opening(entry.path, **_shared(flags) | own)
    with options.progress(f"fetching {entry.path}") as shown:
        path = locate(entry.path, _shared(flags)["hub"], shown)
    if kind is None and embeds(path):
        kind = "embeddings"
    if kind == "embeddings":
        return kind, Opening(path, isq=flags.isq, weights=flags.weights, **_shared(flags) | own)
    return "text", replace(flags.described(str(path)), **own)


def _shared(flags: ServeFlags) -> dict[str, Any]:
    given = flags.given()
    return {name: given[name] for name in SHARED if name in given}


def _name(said: str, opening: Opening) -> str:
    from squall.checkpoints.hub import name_of

    path = Path(opening.path or said)
    return name_of(path) if os.path.exists(said) else said.removesuffix(":latest")


class Store:
    """Models of the hub for clients; opened as the command says of all models, not of its own."""

    def __init__(self, flags: ServeFlags) -> None:
        kept = ("threads", "device", "exact", "token_source", "offline", "keep_alive", "max_seqs",
                "max_queue", "queue_timeout", "kv_dtype", "kv_fraction")  # fmt: skip
        self._flags = type(flags)(**{name: getattr(flags, name) for name in kept})

    def pull(self, name: str, progress: Progress) -> Lazy:
        """See `squall.server.pulls.Store`."""
        entry = Entry(str(pull(name, _shared(self._flags)["hub"], progress, judge)))
        kind, opening = _opening(self._flags, entry)
        needs(kind, opening, sys.maxsize)
        return _lazy(self._flags, entry, kind, opening)

    def remove(self, name: str) -> None:
        """See `squall.server.pulls.Store`."""
        remove(find(name))


def embeds(path: str | Path) -> bool:
    """Whether a file or a folder, or a model that is here by its name, is one of embeddings."""
    from squall.embeddings.files import is_embedding_model

    if not os.path.exists(path):
        with suppress(ModelNotFound):
            path = find(str(path)).path
    return is_embedding_model(path)
