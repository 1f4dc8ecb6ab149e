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
_SYSTEM = """\
You may call tools. Each is a JSON object with the schema of its parameters:
<tools>
{tools}
</tools>
To call one, write this and nothing after it, with arguments that fit its schema:
{example}
Results come in <tool_response></tool_response>."""


def conversation(
    form: ToolFormat, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> tuple[list[Message], list[Message] | None]:
    """What the template is given as `messages` and `tools`.

    Raises InvalidRequest for results of calls that were not made.
    """
    shown: list[Message] = []
    names: dict[str, str] = {}  # of the functions, by the ids of calls
    for i, message in enumerate(messages):
        made = dict(message)
        if calls := message.get("tool_calls"):
            names |= {call.get("id", ""): call["function"]["name"] for call in calls}
            made = _calling(form, message, f"messages[{i}]")
        elif message.get("role") == "tool":
            made = _result(form, message, names)
            if made["role"] == "user" and i and messages[i - 1].get("role") == "tool":
                # Roles take turns in many templates.
                made["content"] = f"{shown.pop()['content']}\n{made['content']}"
        shown.append(made)
    given = [tool.shown() for tool in tools]
    if not given or form.template.tools == "variable":
        return shown, given or None
    _add_system(form, shown, [tool["function"] for tool in given])
    return shown, None


def _calling(form: ToolFormat, message: Mapping[str, Any], where: str) -> Message:
    """An assistant's message with calls; as text where the template does not know them."""
    made: Message = {**message, "content": message.get("content") or ""}
    calls = [_call(form, call, where) for call in made.pop("tool_calls")]
    if form.template.calls:
        return {**made, "tool_calls": calls}
    functions = [call["function"] for call in calls]
    text = form.text([(function["name"], _json(function["arguments"])) for function in functions])
    return {**made, "content": "\n".join(filter(None, (made["content"], text)))}


def _call(form: ToolFormat, call: Mapping[str, Any], where: str) -> Message:
    name, given = call["function"]["name"], call["function"].get("arguments") or "{}"
    try:
        arguments = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, Mapping):
        raise InvalidRequest(
            f"{where} calls {str(name)[:80]!r} with arguments that are no JSON object; send them "
            "as the model wrote them, and no call that was cut"
        )
    if form.template.calls and not form.template.objects:
        arguments = given if isinstance(given, str) else _json(given)
    made: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made | ({"id": _id(form, call["id"])} if "id" in call else {})


def _result(form: ToolFormat, message: Mapping[str, Any], names: Mapping[str, str]) -> Message:
    """A result, with the name of the function; as a user's where the template does not know it."""
    content, call = message.get("content") or "", message.get("tool_call_id")
    if form.template.results == "user":
        made: Message = {"content": f"<tool_response>\n{content}\n</tool_response>"}
    else:
        made = {**message, "content": content}
    if call is not None and call not in names:
        raise InvalidRequest(
            f"a message of role 'tool' has the tool_call_id {str(call)[:80]!r}, which no call "
            "before it has; send the assistant's message with its tool_calls too"
        )
    if call is not None and form.template.results != "user":
        made |= {"tool_call_id": _id(form, call), "name": message.get("name") or names[call]}
    return {**made, "role": form.template.results}


def _id(form: ToolFormat, call: str) -> str:
    if not form.short_ids or re.fullmatch("[A-Za-z0-9]{9}", call):
        return call
    return hashlib.blake2b(call.encode("utf-8", "replace")).hexdigest()[:9]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _add_system(form: ToolFormat, shown: list[Message], tools: Sequence[Message]) -> None:
    """The tools for templates without: in the system message, or the user's first one."""
    role = "system" if form.template.system else "user"
    if not shown or (role == "system" and shown[0]["role"] != "system"):
        shown.insert(0, {"role": role, "content": ""})
    at = next((i for i, message in enumerate(shown) if message["role"] == role), 0)
    if form.template.tools == "system":
        shown[at] |= {"tools": _json(tools)}
        return
    text = _SYSTEM.format(
        tools="\n".join(map(_json, tools)), example=form.text([("NAME", "{ARGUMENTS}")])
    )
    said = shown[at]["content"]
    if isinstance(said, list):
        shown[at] |= {"content": [{"type": "text", "text": f"{text}\n\n"}, *said]}
        return
    before = [said, text] if role == "system" else [text, said]
    shown[at] |= {"content": "\n\n".join(filter(None, before))}
