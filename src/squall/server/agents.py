"""What the endpoints for agents share: a chat put together from items, blocks and tools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from squall.api.requests import ChatCompletionRequest
from squall.engine.fields import described, shown
from squall.engine.sampling import SamplingFields
from squall.errors import InvalidRequest
from squall.server.schemas import Body

Message = dict[str, Any]
SYSTEM = ("system", "developer")


class Conversation:
    """Messages of a chat. What the assistant does in a row is one message."""

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self.messages = list(messages)

    def say(self, role: str, text: str) -> None:
        """Somebody says something."""
        last = self.messages[-1] if self.messages else {"role": ""}
        if role == last["role"] == "assistant" and (last.get("tool_calls") or not last["content"]):
            last["content"] = (last["content"] or "") + text
        else:
            self.messages.append({"role": role, "content": text})

    def think(self, text: str) -> None:
        """The assistant has thought something."""
        last = self._assistant()
        last["reasoning_content"] = last.get("reasoning_content", "") + text

    def call(self, id: str, name: str, arguments: str) -> None:
        """The assistant has called a tool."""
        function = {"name": name, "arguments": arguments}
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": id, "type": "function", "function": function})

    def result(self, id: str, text: str) -> None:
        """A tool has answered."""
        self.messages.append({"role": "tool", "tool_call_id": id, "content": text})

    def _assistant(self) -> Message:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        return self.messages[-1]


class AgentBody(Body, SamplingFields, frozen=True):
    """What their bodies have in common."""

    stream: bool | None = None

    def chat(self, messages: list[Message], system: str, **fields: Any) -> ChatCompletionRequest:
        """The same as a chat; a field that is None or empty says nothing."""
        if system and messages and messages[0]["role"] in SYSTEM:  # templates have a place for one
            system, messages = f"{system}\n\n{messages[0]['content']}", messages[1:]
        head = [{"role": "system", "content": system}] if system else []
        said = {name: value for name, value in fields.items() if value not in (None, [])}
        said |= self.model_dump(include=set(described(SamplingFields)), exclude_none=True)
        return ChatCompletionRequest(messages=[*head, *messages], **said)


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


def tools(given: Sequence[Message] | None, kind: str, schema: str) -> list[Message]:
    """Tools as chats have them; `schema` is the field of their parameters."""
    found = []
    for i, one in enumerate(given or ()):
        if one.get("type", "custom") != kind:
            wrong = shown(one.get("type"))
            raise InvalidRequest(f"tools[{i}].type is {wrong}; only {kind!r} is known")
        function = {name: one.get(name) for name in ("name", "description", "strict")}
        function["parameters"] = one.get(schema)
        said = {name: value for name, value in function.items() if value is not None}
        found.append({"type": "function", "function": said})
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
