"""What the files of a tokenizer say of tokens."""

from __future__ import annotations

from squall.files import parse_json, read_json, read_text

__all__ = ["parse_json", "read_json", "read_text", "token_ids", "token_text"]


def token_text(value: object) -> str | None:
    """The text of a token as configurations give it: a string, or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def token_ids(value: object) -> list[int]:
    """Token ids as configurations give them: none, one, or a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]
