"""The JSON files of a checkpoint folder, read within limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from squall.errors import InvalidCheckpoint

MAX_JSON_BYTES = 256 << 20


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str | None:
    """The text of a file, or None where there is no such file."""
    try:
        if path.stat().st_size > limit:
            raise InvalidCheckpoint(f"{path.name} has over {limit} bytes, which is the limit")
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"cannot read {path.name}: {error}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file."""
    text = read_text(path)
    return None if text is None else parse_json(text, path.name)


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The object that JSON text is; `name` is for errors."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{name} must hold a JSON object, not {type(value).__name__}")
    return value


def token_text(value: object) -> str | None:
    """The text of a token as configurations give it: a string, or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def token_ids(value: object) -> list[int]:
    """Token ids as configurations give them: none, one, or a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]
