"""What the endpoints for agents share: a chat put together from items, blocks and tools."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic_core import from_json

from squall.api.messages import Content, joined, text_of
from squall.api.requests import ChatCompletionRequest
from squall.server.schemas import GenerationBody

Object = dict[str, Any]
_KNOWN = ChatCompletionRequest.__dataclass_fields__.keys()
_SYSTEM = ("system", "developer")


class AgentBody(GenerationBody, frozen=True):
    """A chat in other words; the fields that only chats have are good as well."""

    tool_type: ClassVar[str]

    n: Literal[1] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Object | None = None

    @property
    def ignored(self) -> list[str]:
        """Also tools that are none of the client's functions, which agents send whoever answers."""
        others = (str(tool["type"]) for tool in self.tools or () if self._is_other(tool))
        return [*super().ignored, *(f"tools.{kind}" for kind in others)]

    def chat(self, said: list[Object], system: object, **fields: Any) -> ChatCompletionRequest:
        """The same as a chat; fields that are None say nothing."""
        if system:  # one with what follows, as templates have a place for one
            more = said.pop(0) if said and said[0]["role"] in _SYSTEM else None
            texts = [text_of(system, "system"), *([more["content"]] if more else [])]
            said = [{"role": "system", "content": "\n\n".join(texts)}, *said]
        tools = [_tool(tool) for tool in self.tools or () if not self._is_other(tool)]
        fields |= {"messages": said, "tools": tools}
        given = {name: value for name, value in self.given().items() if name in _KNOWN}
        own = {name: value for name, value in fields.items() if value is not None}
        return ChatCompletionRequest(**{**given, **own})

    def _is_other(self, tool: Object) -> bool:
        return tool.get("type") not in (None, self.tool_type)


def _tool(tool: Object) -> Object:
    if isinstance(tool.get("function"), dict):
        return tool
    parameters = tool.get("parameters", tool.get("input_schema"))
    return {"type": "function", "function": {**tool, "parameters": parameters}}


def turn(said: list[Object], role: str, *, new: bool = False) -> Object:
    """The message for what somebody does now; what one does in a row is one, unless it is new."""
    if new or not said or said[-1]["role"] != role:
        said.append({"role": role})
    return said[-1]


def say(said: list[Object], role: str, content: Content, *, new: bool = False) -> None:
    last = turn(said, role, new=new)
    last["content"] = joined(last.get("content", ""), content)


def call(said: list[Object], id: str, name: str, arguments: str) -> None:
    function = {"name": name, "arguments": arguments}
    calls = turn(said, "assistant").setdefault("tool_calls", [])
    calls.append({"id": id, "type": "function", "function": function})


def arguments_of(text: str) -> Object:
    """A call's arguments; of those that are cut as much as clients make of a stream's."""
    try:
        found = from_json(text, allow_partial=True, allow_inf_nan=False)
        json.dumps(found, allow_nan=False)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
