"""What the endpoints for agents share: a chat put together from items, blocks and tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from squall.api.requests import ChatCompletionRequest
from squall.engine.fields import described, shown
from squall.engine.sampling import SamplingFields
from squall.errors import InvalidRequest
from squall.server.schemas import Body

Object = dict[str, Any]


class AgentBody(Body, SamplingFields, frozen=True):
    """What their bodies have in common."""

    stream: bool | None = None

    def chat(self, said: list[Object], system: str, **fields: Any) -> ChatCompletionRequest:
        """The same as a chat; a field that is None or empty says nothing."""
        if system and said and said[0]["role"] in ("system", "developer"):
            # Templates have a place for one.
            system, said = f"{system}\n\n{said[0]['content']}", said[1:]
        messages = [{"role": "system", "content": system}, *said] if system else said
        given = {name: value for name, value in fields.items() if value not in (None, [])}
        given |= self.model_dump(include=set(described(SamplingFields)), exclude_none=True)
        return ChatCompletionRequest(messages=messages, **given)


def say(said: list[Object], role: str, text: str) -> None:
    """Somebody says something."""
    if role == "assistant":
        last = assistant(said)
        last["content"] = (last["content"] or "") + text
    else:
        said.append({"role": role, "content": text})


def call(said: list[Object], id: str, name: str, arguments: str) -> None:
    """The assistant calls a tool."""
    function = {"name": name, "arguments": arguments}
    calls = assistant(said).setdefault("tool_calls", [])
    calls.append({"id": id, "type": "function", "function": function})


def assistant(said: list[Object]) -> Object:
    """The message for what the assistant does now; all that it does in a row is one."""
    if not said or said[-1]["role"] != "assistant":
        said.append({"role": "assistant", "content": None})
    return said[-1]


def text_of(content: object, where: str) -> str:
    """The text of a message, result or thought, however it is given."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        match part:
            case {"text": str(text)} | {"refusal": str(text)}:
                texts.append(text)
            case _:
                raise InvalidRequest(f"{where} is {shown(part)}; only texts are known")
    return "".join(texts)


def tools(given: Sequence[Object] | None, kind: str, schema: str) -> list[Object]:
    """Tools as chats have them; `schema` is the field of their parameters."""
    names = {"name": "name", "description": "description", "parameters": schema, "strict": "strict"}
    found = []
    for i, tool in enumerate(given or ()):
        if tool.get("type", "custom") != kind:
            wrong = shown(tool.get("type"))
            raise InvalidRequest(f"tools[{i}].type is {wrong}; only {kind!r} is known")
        function = {to: tool[name] for to, name in names.items() if tool.get(name) is not None}
        found.append({"type": "function", "function": function})
    return found


def tool_choice(given: Any) -> Any:
    """The choice as chats have it; they say what is wrong with others."""
    match given:
        case {"type": "auto" | "none" as choice}:
            return choice
        case {"type": "any"}:
            return "required"
        case {"type": "function" | "tool", "name": name}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "tools": [*allowed], **rest}:
            mode = {**rest, "tools": list(map(tool_choice, allowed))}
            return {"type": "allowed_tools", "allowed_tools": mode}
    return given


def response_format(given: Any) -> Any:
    """The form of the answer as chats have it; they say what is wrong with others."""
    match given:
        case {"type": "json_schema", **schema}:
            return {"type": "json_schema", "json_schema": {"name": "answer", **schema}}
    return given
