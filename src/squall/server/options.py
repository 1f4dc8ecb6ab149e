"""How a server behaves: who may ask, how much, and how long."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from squall.errors import InvalidRequest
from squall.mcp import McpTools
from squall.vision.images import Media

if TYPE_CHECKING:
    from squall.server.pulls import Store

MIB = 2**20
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def keep_alive_s() -> float:
    """The pause after which a stream gets a comment; KEEP_ALIVE_INTERVAL is in milliseconds."""
    text = os.environ.get("KEEP_ALIVE_INTERVAL", "1000")
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**7):
        raise InvalidRequest(f"KEEP_ALIVE_INTERVAL is {text!r}; it must be milliseconds, above 0")
    return int(text) / 1000


_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)"
_PART = _NUMBER + "(h|ms|m|s|us|ns)"
_TIME = re.compile(f"-?(?:{_PART})+")
_UNITS_S = {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_MOST_S = 1e9


def duration_s(given: str | float) -> float | None:
    """Seconds of "10m", "1h30m", 300 or "300"; None, for ever, of what is negative, or vast."""
    if isinstance(given, float):
        given = f"{max(min(given, 2 * _MOST_S), -1.0):f}"
    text = str(given).strip()
    text += "s" * bool(re.fullmatch("-?" + _NUMBER, text))
    if not _TIME.fullmatch(text):
        raise InvalidRequest(
            f"keep_alive: {given!r:.99} is no time; such are 30s, 10m, 1h30m, 0; -1: for ever"
        )
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in re.findall(_PART, text))
    return None if text.startswith("-") or seconds > _MOST_S else seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a server allows.

    model_id: the name for clients of a model that is given without one; by default its file's.
    any_model: where one model is served, answer whatever the name of the model in a request is,
        as long as there are no adapters, for which it could be meant.
    adapter_folders: clients may have adapters loaded from here, and removed; none: they may not.
    strict_fields: fields that nobody knows are errors; otherwise they are ignored, and told.
    api_keys: one of them is asked for, unless there are none. Each has its own prefix cache.
    admin_key: asked for by what changes the models for everybody, and good for the rest.
    origins: web pages of these origins may use the server; "*" is all of them.
    hosts: names the server may be called by; None: any. What keeps web pages that point a name of
        their own at this machine from reading answers.
    truncate: cut the beginning of prompts that are too long instead of refusing them.
    seed: for requests that give none; by default each draws its own.
    log: a file that gets every request and response.
    ui: a web page at /ui.
    throughput: tell tokens a second in the access log.
    memory_bytes: what models that are loaded when they are asked for may take together, with those
        that are open; by default what the machine and its control groups have.
    media: which images may come from where, beside those in requests.
    body_bytes, all_bodies_bytes: of one request's body, and of those being read or parsed together.
    header_s, body_s, write_s: how long a client may take to send its header, to send its body, and
        to take what is written to it. keep_alive_s: a comment for streams that are silent.
    drain_s: what running answers get to end after a first signal to stop.
    kept_responses, kept_bytes: of /v1/responses, for clients that go on with them.
    stall_s: the engine is dead if no step ends for so long.
    store: where models come from that clients may download, and remove again; None: they may not.
    mcp: tools that the server runs itself for chats that have none of their own.
    image_folder: of pictures that clients get as URLs; None: a new one. They are removed after
        image_age_s, or when they take more than image_bytes.
    """

    model_id: str | None = None
    any_model: bool = True
    adapter_folders: tuple[Path, ...] = ()
    strict_fields: bool = False
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    truncate: bool = False
    seed: int | None = None
    log: Path | None = None
    ui: bool = True
    throughput: bool = False
    memory_bytes: int | None = None
    media: Media = field(default_factory=Media)
    body_bytes: int = 32 * MIB
    all_bodies_bytes: int = 256 * MIB
    kept_responses: int = 1000
    kept_bytes: int = 64 * MIB
    header_s: float = 10.0
    body_s: float = 60.0
    write_s: float = 60.0
    keep_alive_s: float = 1.0
    drain_s: float = 30.0
    stall_s: float = 300.0
    store: Store | None = None
    mcp: McpTools | None = None
    image_folder: Path | None = None
    image_age_s: float = 3600.0
    image_bytes: int = 1024 * MIB

    def __post_init__(self) -> None:
        for key in (*self.api_keys, *(() if self.admin_key is None else (self.admin_key,))):
            if not (key.isascii() and key.isprintable() and key.strip() == key and key):
                raise InvalidRequest("an API key must be printable ASCII, and not empty")
        folder = self.image_folder
        if folder is not None and folder.exists() and not folder.is_dir():
            raise InvalidRequest(f"--image-folder: {str(folder)!r} is no folder")
        for folder in self.adapter_folders:
            if not folder.is_dir():
                raise InvalidRequest(f"--adapter-folder: there is no folder {str(folder)!r}")
