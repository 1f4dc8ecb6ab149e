r"""What a chat keeps: its settings, by the names of requests' fields, and files of \save."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.checkpoints.writing import replacing
from squall.cli.run import Settings
from squall.engine.fields import Number, check_texts, complaint, described
from squall.engine.sampling import DRY, SamplingFields
from squall.errors import InvalidRequest
from squall.files import quote, read_json

if TYPE_CHECKING:
    from squall.vision.images import Media

Messages = list[dict[str, Any]]

FIELDS: Mapping[str, Number | str] = {
    **described(SamplingFields),
    "max_tokens": Number(help="At most so many tokens an answer.", whole=True, least=1),
}


def changed(settings: Settings, name: str, value: object) -> Settings:
    """The settings with another value of one; None: the default again."""
    about = FIELDS[name]
    if value is not None and isinstance(about, Number):
        about.check(name, value)
    elif value is not None:
        check_texts(name, value)
    options, dry = dict(settings.options), dict(settings.dry)
    place, key = (dry, _in_dry(name)) if name.startswith(DRY) else (options, name)
    place.pop(key, None)
    if value is not None:
        place[key] = value
    return Settings(options, {"multiplier": 0.0} | dry)


def _in_dry(name: str) -> str:
    return name.removeprefix(DRY).removeprefix("sequence_")


def parsed(name: str, text: str) -> object:
    """The value that was typed: a number, a list as JSON has it, or `default`."""
    if text == "default":
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        about = FIELDS[name]
        allowed = about.allowed if isinstance(about, Number) else 'a list of texts, such as ["."]'
        raise InvalidRequest(complaint(name, text, f"{allowed}; or default")) from None


def values(settings: Settings) -> dict[str, Any]:
    """The settings that are not left to the model."""
    dry = {name: settings.dry.get(_in_dry(name)) for name in FIELDS if name.startswith(DRY)}
    found = {name: settings.options.get(name) for name in FIELDS} | dry
    return {name: value for name, value in found.items() if value is not None}


def save(path: Path, messages: Messages, settings: Settings) -> None:
    """Write a conversation as OpenAI's API has it, with its settings; whole or not at all."""
    kept = {"messages": [*map(_sent, messages)], "settings": values(settings)}
    try:
        with replacing(path, force=True) as file:
            file.write(json.dumps(kept, indent=1, ensure_ascii=False).encode())
    except ValueError as error:
        raise InvalidRequest(f"cannot write {path}: {error}") from None


def load(path: Path, settings: Settings, media: Media) -> tuple[Messages, Settings]:
    """What `save` has written; raises InvalidRequest or InvalidCheckpoint for other files."""
    found = read_json(path)
    if found is None:
        raise InvalidRequest(f"there is no file {str(path)!r}")
    messages, given = found.get("messages"), found.get("settings", {})
    if not isinstance(messages, list) or not isinstance(given, dict):
        raise InvalidRequest(f"{path.name} is no saved chat: it needs a list of messages")
    if unknown := given.keys() - FIELDS.keys():
        raise InvalidRequest(f"{path.name}: {quote(min(unknown))} is no setting")
    for name in FIELDS:
        settings = changed(settings, name, given.get(name))
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise InvalidRequest(f"{path.name}: users and assistants must take turns, answered each")
    return [_read(message, media) for message in messages], settings


def _sent(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    parts = content if isinstance(content, str) else [*map(_sent_part, content)]
    return message | {"content": parts}


def _sent_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    data = io.BytesIO()
    part["source"].save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _read(message: dict[str, Any], media: Media) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and message["role"] == "user":
        content = [_read_part(part, media) for part in content]
    elif not isinstance(content, str):
        raise InvalidRequest("the content of a message must be a text, or of a user's a list")
    return {"role": message["role"], "content": content}


def _read_part(part: object, media: Media) -> dict[str, Any]:
    from squall.vision.images import read

    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url)}} if url.startswith("data:"):
            return {"type": "image", "source": read(url, media)}
    raise InvalidRequest("a part of a message must be a text or an image in a data: URL")
