"""The messages of a chat, checked, and of each what templates are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Any

from squall.engine.fields import check, shown
from squall.errors import InvalidRequest
from squall.text.chat import REASONING
from squall.text.images import part_of

MOST_MESSAGES = 4096
MOST_PARTS = 1024
MOST_CALLS = 128

Messages = str | Sequence[Mapping[str, Any]]
ROLES: Mapping[str, str] = MappingProxyType({"developer": "system", "function": "tool"})
Content = str | list[dict[str, Any]]
_TEXTS = ("name", "tool_call_id", *REASONING)


def conversation(messages: Messages) -> list[dict[str, Any]]:
    """What templates are to see of messages as clients send them; a text is a user's.

    Where there are images the content is a list of parts: {"type": "text", "text"}, and {"type":
    "image", "source", "detail"} with the source as it was sent.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    check(isinstance(messages, Sequence), "messages", messages, "a text or a list of messages")
    check_short("messages", messages, MOST_MESSAGES)
    if not len(messages):
        raise InvalidRequest("messages is empty; give at least one")
    said = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    return _results_as_texts(said) if images_of(said) else said


def images_of(messages: Messages) -> list[dict[str, Any]]:
    """The parts of a checked conversation that are images, in reading order."""
    contents = [message["content"] for message in messages if not isinstance(message, str)]
    lists = [content for content in contents if isinstance(content, list)]
    return [part for parts in lists for part in parts if part["type"] == "image"]


def joined(*contents: Content) -> Content:
    if all(isinstance(content, str) for content in contents):
        return "".join(map(str, contents))
    lists = ([{"type": "text", "text": c}] if isinstance(c, str) else c for c in contents if c)
    return [part for parts in lists for part in parts]


def check_short(name: str, values: Sized, most: int, what: str = "entries") -> None:
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
    content = content_of(content, f"{where}.content", role)
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


def _results_as_texts(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images of tools' results follow these as the user's, as templates know them nowhere else."""
    after = len(said)
    for i in reversed(range(after)):
        if said[i]["role"] != "tool":
            after = i
        elif images := images_of([said[i]]):
            texts = [part["text"] for part in said[i]["content"] if part["type"] == "text"]
            said[i]["content"] = "".join(texts)
            if [message["role"] for message in said[after : after + 1]] != ["user"]:
                said.insert(after, {"role": "user", "content": ""})
            said[after]["content"] = joined(images, said[after]["content"])
    return said


def text_of(content: object, where: str) -> str:
    return str(content_of(content, where, "system"))


def content_of(content: object, where: str, role: str) -> Content:
    """The text of a content, or if it has images its parts: a user's, or a tool's result."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where} must be a text, or a list of parts")
    check_short(where, content, MOST_PARTS)
    sees = role in ("user", "tool", "function")
    parts = [part_of(part, where, sees=sees) for part in content]
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)
