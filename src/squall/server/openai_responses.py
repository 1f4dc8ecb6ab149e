"""OpenAI's Responses: the body, the chat that it is, and its answer as object and events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from squall.api.jobs import ChatJob, start_chat
from squall.api.requests import ChatCompletionRequest
from squall.engine.fields import shown
from squall.errors import InvalidRequest
from squall.server import agents
from squall.server.agents import AgentBody, Conversation, text_of
from squall.server.dialect import Event, Section, Sections
from squall.server.errors import ApiError
from squall.server.kept import Told
from squall.server.schemas import FEW, Parts
from squall.server.service import Served

MOST_METADATA = 16
# What responses repeat of their requests, and what they say of what was not given.
_TOLD: dict[str, Any] = {
    "background": False, "instructions": None, "max_output_tokens": None, "metadata": {},
    "parallel_tool_calls": True, "previous_response_id": None, "reasoning": {}, "store": True,
    "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
    "top_p": None, "truncation": None,
}  # fmt: skip
_IDS = {"text": "msg", "reasoning": "rs", "call": "fc"}
_EVENTS = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}


class ResponsesBody(AgentBody, frozen=True):
    """POST /v1/responses."""

    input: Parts
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[dict[str, Any]], FEW] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MOST_METADATA)] | None = None
    background: Literal[False] | None = None
    conversation: None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None

    def said_after(self, previous: list[agents.Message]) -> list[agents.Message]:
        """All that was said, without the instructions, which are for one answer."""
        said = Conversation(previous)
        alone = [{"role": "user", "content": self.input}]
        for i, item in enumerate(alone if isinstance(self.input, str) else self.input):
            where = f"input[{i}]"
            match item:
                case {"type": "function_call", "call_id": str(id), "name": str(name)}:
                    said.call(id, name, text_of(item.get("arguments"), where))
                case {"type": "function_call_output", "call_id": str(id), "output": output}:
                    said.result(id, text_of(output, where))
                case {"type": "reasoning"}:
                    said.think(text_of(item.get("content") or item.get("summary") or "", where))
                case {"role": str(role), "content": content} if item.get("type") in _MESSAGE:
                    said.say(role, text_of(content, where))
                case _:
                    raise InvalidRequest(f"{where} is {shown(item)}; {_ITEMS}")
        return said.messages

    def request(self, said: list[agents.Message], **defaults: Any) -> ChatCompletionRequest:
        """The same as a chat."""
        if self.truncation is not None:
            defaults["truncate_sequence"] = self.truncation == "auto"
        return self.chat(
            said,
            self.instructions or "",
            **defaults,
            max_tokens=self.max_output_tokens,
            tools=agents.tools(self.tools, "function", "parameters"),
            tool_choice=agents.tool_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=agents.response_format((self.text or {}).get("format")),
            reasoning_effort=(self.reasoning or {}).get("effort"),
        )


_MESSAGE = ("message", None)
_ITEMS = (
    "it must be a message of role and content, a function_call of call_id, name and arguments, "
    "a function_call_output of call_id and output, or of type reasoning"
)


class Responses(Sections):
    """Tells an answer as a response, and keeps it."""

    prefix = "resp"

    def __init__(
        self, served: Served, body: ResponsesBody, keep: Callable[[str, Told], None]
    ) -> None:
        super().__init__(served.name)
        self._served = served
        self._body = body
        self._keep = keep
        self._said = b""
        self._number = 0

    def start(self, tenant: str, previous: Told | None) -> ChatJob:
        """Begin to answer, after a previous response if there is one."""
        said = self._body.said_after(json.loads(previous.messages) if previous else [])
        self._said = json.dumps(said).encode()  # here, beside the event loop
        asked = self._body.request(said, **self._served.defaults)
        return start_chat(self._served.model, asked, id=self.id, tenant=tenant)

    def begin(self) -> Iterable[Event]:
        for name in ("created", "in_progress"):
            yield self._event(name, response=self._response("in_progress"))

    def open(self, section: Section) -> Iterable[Event]:
        item = self._item(section, "in_progress")
        yield self._event("output_item.added", output_index=section.index, item=item)
        if section.kind != "call":
            part = _part(section)
            yield self._event("content_part.added", **self._at(section), part=part)

    def more(self, section: Section, text: str) -> Iterable[Event]:
        yield self._event(f"{_EVENTS[section.kind]}.delta", **self._at(section), delta=text)

    def close(self, section: Section) -> Iterable[Event]:
        name, at = f"{_EVENTS[section.kind]}.done", self._at(section)
        if section.kind == "call":
            yield self._event(name, **at, name=section.name, arguments=section.text)
        else:
            yield self._event(name, **at, text=section.text)
            yield self._event("content_part.done", **at, part=_part(section))
        item = self._item(section, self._status)
        yield self._event("output_item.done", output_index=section.index, item=item)

    def finish(self) -> Iterable[Event]:
        response = self.final()
        if self._body.store is not False:
            answer = Conversation()
            for section in self.sections:
                section.add(answer)
            lists = (self._said[1:-1], json.dumps(answer.messages).encode()[1:-1])
            messages = b"[" + b",".join(filter(None, lists)) + b"]"
            self._keep(self.id, Told(json.dumps(response).encode(), messages))
        yield self._event(self._status, response=response)

    def failure(self, error: ApiError) -> Event:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        told = {"code": code, "message": error.message}
        return self._event("failed", response=self._response("failed", error=told))

    def final(self) -> dict[str, Any]:
        cut, usage = self.finish_reason == "length", self.usage
        return self._response(
            self._status,
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage=usage and {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    **usage.prompt_tokens_details.to_dict(), "cache_write_tokens": 0
                },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": usage.completion_tokens_details.to_dict(),
                "total_tokens": usage.total_tokens,
            },
        )  # fmt: skip

    @property
    def _status(self) -> str:
        return "incomplete" if self.finish_reason in ("length", "canceled") else "completed"

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        """The object; much of it says what was asked for."""
        states = ["completed"] * (len(self.sections) - 1)
        states.append("completed" if status == "completed" else "incomplete")
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": None, "incomplete_details": None, "model": self.model, "usage": None,
            "output": list(map(self._item, self.sections, states)),
            **_TOLD, **self._body.model_dump(include=set(_TOLD), exclude_none=True), **more,
        }  # fmt: skip

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        if kind.startswith("output_text"):
            fields["logprobs"] = []
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}

    def _at(self, section: Section) -> dict[str, Any]:
        at = {"item_id": self._item_id(section), "output_index": section.index}
        return at if section.kind == "call" else {**at, "content_index": 0}

    def _item_id(self, section: Section) -> str:
        return f"{_IDS[section.kind]}_{self.hex}_{section.index}"

    def _item(self, section: Section, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(section), "status": status}
        if section.kind == "call":
            called = {"name": section.name, "arguments": section.text}
            return {"type": "function_call", **item, "call_id": section.call_id, **called}
        item["content"] = [] if status == "in_progress" else [_part(section)]
        if section.kind == "reasoning":
            return {"type": "reasoning", **item, "summary": []}
        return {"type": "message", **item, "role": "assistant"}


def _part(section: Section) -> dict[str, Any]:
    part = {"type": _EVENTS[section.kind], "text": section.text}
    return part | ({"annotations": [], "logprobs": []} if section.kind == "text" else {})
