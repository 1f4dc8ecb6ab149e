"""A conversation with calls of tools, as a chat template wants it.

Names, arguments and results stay content of messages: control tokens in them are never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from squall.errors import InvalidRequest
from squall.text.tool_formats import ToolFormat
from squall.text.tools import Tool

Message = dict[str, Any]


def conversation(
    form: ToolFormat, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> tuple[list[Message], list[Message] | None]:
    """What the template is given as `messages` and `tools`.

    Raises InvalidRequest for results of calls that were not made.
    """
    shown: list[Message] = []
    names: dict[str, str] = {}  # of the functions, by the ids of calls
    for i, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            names |= {call.get("id", ""): call["function"]["name"] for call in calls}
            shown += _calling(form, message, f"messages[{i}]")
        elif message.get("role") == "tool":
            made = _result(form, message, names)
            if made["role"] == "user" and i and messages[i - 1].get("role") == "tool":
                shown[-1]["content"] += "\n" + made["content"]  # many templates want roles in turn
            else:
                shown.append(made)
        else:
            shown.append(dict(message))
    given = [tool.shown() for tool in tools]
    if form.join is None and form.template.calls:
        shown = _one_at_a_time(shown)
    if not given or form.template.tools == "variable":
        return shown, given or None
    _add_system(form, shown, given)
    return shown, None


def _calling(form: ToolFormat, message: Mapping[str, Any], where: str) -> list[Message]:
    """An assistant's message with calls; as text where the template does not know them."""
    calls = [_call(form, call, where) for call in message["tool_calls"]]
    made: Message = {**message, "content": message.get("content") or "", "tool_calls": calls}
    if not form.template.calls:
        del made["tool_calls"]
        functions = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        text = form.text([(name, json.dumps(a, ensure_ascii=False)) for name, a in functions])
        made["content"] = "\n".join(filter(None, (made["content"], text)))
    return [made]


def _call(form: ToolFormat, call: Mapping[str, Any], where: str) -> Message:
    name, given = call["function"]["name"], call["function"].get("arguments") or "{}"
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
        right = isinstance(arguments, Mapping)
    except (ValueError, RecursionError):
        right = False
    if not right:
        raise InvalidRequest(
            f"{where} calls {str(name)[:80]!r} with arguments that are no JSON object; send them "
            "as the model wrote them, and no call that was cut"
        )
    if form.template.calls and not form.template.objects:
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    made: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": _id(form, call["id"])} if "id" in call else {})


def _result(form: ToolFormat, message: Mapping[str, Any], names: Mapping[str, str]) -> Message:
    """A result, with the name of the function; as a user's where the template does not know it."""
    made = {**message, "role": form.template.results, "content": message.get("content") or ""}
    if (call := message.get("tool_call_id")) is not None:
        if call not in names:
            raise InvalidRequest(
                f"a message of role 'tool' has the tool_call_id {str(call)[:80]!r}, which no call "
                "before it has; send the assistant's message with its tool_calls too"
            )
        made |= {"tool_call_id": _id(form, call), "name": message.get("name") or names[call]}
    if form.template.results == "user":
        text = f"<tool_response>\n{made['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    return made


def _id(form: ToolFormat, call: str) -> str:
    if not form.short_ids or re.fullmatch("[A-Za-z0-9]{9}", call):
        return call
    return hashlib.blake2b(call.encode("utf-8", "replace")).hexdigest()[:9]


def _one_at_a_time(messages: Sequence[Message]) -> list[Message]:
    """Each call with its result, for templates that refuse several calls in a message."""
    results = {
        message["tool_call_id"]: message for message in messages if "tool_call_id" in message
    }
    made: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            made += [message] if message.get("tool_call_id") in (None, *results) else []
            continue
        for call in calls:
            made.append({**message, "tool_calls": [call]})
            made += filter(None, [results.pop(call.get("id"), None)])
    return made


def _add_system(form: ToolFormat, shown: list[Message], tools: Sequence[Message]) -> None:
    """The tools for templates without: in the system message, or the user's first one."""
    role = "system" if form.template.system else "user"
    if not shown or (role == "system" and shown[0]["role"] != "system"):
        shown.insert(0, {"role": role, "content": ""})
    at = next((i for i, message in enumerate(shown) if message["role"] == role), 0)
    message = shown[at] = dict(shown[at])
    if form.template.tools == "system":
        message["tools"] = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
        return
    example = form.text([("NAME", "{ARGUMENTS}")])
    text = "\n".join((
        "You may call tools. Each is a JSON object with the schema of its parameters:",
        "<tools>",
        *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools),
        "</tools>",
        "To call one, write this and nothing after it, with arguments that fit its schema:",
        example,
        "Results come in <tool_response></tool_response>.",
    ))  # fmt: skip
    parts = (message["content"], text) if role == "system" else (text, message["content"])
    message["content"] = "\n\n".join(filter(None, parts))
