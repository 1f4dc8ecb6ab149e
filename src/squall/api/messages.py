"""The messages of a chat, checked, and of each what templates are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Any

from squall.engine.fields import check, shown
from squall.errors import InvalidRequest
from squall.text.chat import REASONING

MOST_MESSAGES = 4096
MOST_PARTS = 1024
MOST_CALLS = 128

Messages = str | Sequence[Mapping[str, Any]]
ROLES: Mapping[str, str] = MappingProxyType({"developer": "system", "function": "tool"})
# Parts of a message's content that are texts, with where the text is.
TEXT_PARTS: Mapping[str, str] = MappingProxyType({
    "text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"
})  # fmt: skip
_TEXTS = ("name", "tool_call_id", *REASONING)


def conversation(messages: Messages) -> list[dict[str, Any]]:
    """What templates are to see of messages as clients send them; a text is a user's."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    check(isinstance(messages, Sequence), "messages", messages, "a text or a list of messages")
    check_short("messages", messages, MOST_MESSAGES)
    if not len(messages):
        raise InvalidRequest("messages is empty; give at least one")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_short(name: str, values: Sized, most: int, what: str = "entries") -> None:
    """Raises InvalidRequest for more than `most`."""
    if len(values) > most:
        raise InvalidRequest(f"{name} has {len(values)} {what}; at most {most} are allowed")


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} must have a role and a content")
    if message.get("function_call"):
        raise InvalidRequest(f"{where}.function_call is not supported; send tool_calls")
    role, content = str(message["role"]), message.get("content")
    if role == "assistant" and content is None:
        # So do clients that send back what they got: a refusal, or an answer without a text.
        content = message.get("refusal") or ""
    content = text_of(content, f"{where}.content")
    checked: dict[str, Any] = {"role": ROLES.get(role, role), "content": content}
    if calls := message.get("tool_calls"):
        checked["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    return checked | {name: text for name in _TEXTS if isinstance(text := message.get(name), str)}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls with the arguments as they came: JSON, or an object."""
    check(isinstance(calls, list | tuple), where, calls, "a list of calls")
    check_short(where, calls, MOST_CALLS)
    found: list[dict[str, Any]] = []
    for call in calls:
        match call:
            case {"function": {"name": str(name), **rest}, **others}:
                function = {"name": name, "arguments": rest.get("arguments") or "{}"}
                id_ = {"id": id_} if isinstance(id_ := others.get("id"), str) else {}
                found.append({**id_, "type": "function", "function": function})
            case _:
                raise InvalidRequest(
                    f"{where} must have a function with a name each: {shown(call)}"
                )
    return found


def text_of(content: object, where: str) -> str:
    """The text of a content, or of its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where} must be a text, or a list of text parts")
    check_short(where, content, MOST_PARTS)
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in TEXT_PARTS:
            raise InvalidRequest(f"{where} has a part of type {shown(kind)}; only 'text' is known")
        text = part.get(TEXT_PARTS[kind])
        if not isinstance(text, str):
            raise InvalidRequest(f"{where} has a part of type {kind!r} without a text")
        found.append(text)
    return "".join(found)
