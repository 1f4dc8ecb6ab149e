"""Untrusted texts: JSON within limits, names safe to print."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

from squall.errors import InvalidCheckpoint

# About twice what the largest known tokenizers need (262 k pieces, 515 k merges).
MAX_JSON_BYTES = 64 << 20
# Objects, lists and items: what a parsed text costs in memory, not in bytes.
MAX_JSON_BRACKETS = 1 << 20
MAX_JSON_COMMAS = 1 << 22
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def quote(name: str) -> str:
    """A name from a file, safe to print and of bounded length."""
    return repr(name if len(name) <= 80 else name[:80] + "...")


def printable(text: str) -> str:
    """A text that steers no terminal: it shows control characters but for line ends and tabs."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str | None:
    """The text of a file, or None where there is no such file."""
    try:
        found = path.stat()
        # Before opening: to open a pipe blocks.
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            raise InvalidCheckpoint(
                f"{quote(path.name)} has {found.st_size} bytes; it must be a file, and the limit "
                f"is {limit}"
            )
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"cannot read {quote(path.name)}: {error}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file."""
    text = read_text(path)
    return None if text is None else parse_json(text, path.name)


def parse_json(data: str | bytes, source: str, *, unique: bool = False) -> dict[str, Any]:
    """The object that a JSON text is; `source` names it in errors.

    unique: no key may be in one object twice. Otherwise the last counts.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            double = next(key for key in found if keys.count(key) > 1)
            raise InvalidCheckpoint(f"{quote(source)}: {quote(double)} appears twice")
        return found

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        _check_counts(text, source)
        value = json.loads(text, object_pairs_hook=checked if unique else None)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidCheckpoint(f"{quote(source)} is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{quote(source)} is not a JSON object")
    return value


def _check_counts(text: str, source: str) -> None:
    brackets, commas = text.count("[") + text.count("{"), text.count(",")
    if brackets > MAX_JSON_BRACKETS or commas > MAX_JSON_COMMAS:
        raise InvalidCheckpoint(
            f"{quote(source)} has {brackets} lists and objects and {commas} commas; "
            f"the limits are {MAX_JSON_BRACKETS} and {MAX_JSON_COMMAS}"
        )
