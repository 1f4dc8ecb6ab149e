"""Untrusted texts: JSON within limits, names safe to print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from squall.checkpoints.mapped import map_file
from squall.errors import InvalidCheckpoint

MAX_JSON_BYTES = 32 << 20
# Objects, lists and items: what a parsed text costs in memory, not in bytes.
MAX_JSON_BRACKETS = 1 << 18
MAX_JSON_COMMAS = 1 << 21


def quote(name: str) -> str:
    """A name from a file, safe to print and of bounded length."""
    return repr(name if len(name) <= 80 else name[:80] + "...")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    buffer = map_file(path, "name a folder with a model")
    if len(buffer) > MAX_JSON_BYTES:
        raise InvalidCheckpoint(
            f"{quote(path.name)} has {len(buffer)} bytes; the limit is {MAX_JSON_BYTES}"
        )
    return parse_json(buffer[:], path.name)


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """The object that a JSON text is; no key may be in one object twice."""
    brackets, commas = data.count(b"[") + data.count(b"{"), data.count(b",")
    if brackets > MAX_JSON_BRACKETS or commas > MAX_JSON_COMMAS:
        raise InvalidCheckpoint(
            f"{quote(source)} has {brackets} lists and objects and {commas} commas; "
            f"the limits are {MAX_JSON_BRACKETS} and {MAX_JSON_COMMAS}"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            double = next(key for key in found if keys.count(key) > 1)
            raise InvalidCheckpoint(f"{quote(source)}: {quote(double)} appears twice")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidCheckpoint(f"{quote(source)} is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{quote(source)} is not a JSON object")
    return value
