"""Anthropic's Messages: the body, the chat that it is, and its answer as object and events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Annotated, Any

from pydantic import Field
from pydantic_core import from_json

from squall.api.requests import ChatCompletionRequest
from squall.engine.fields import shown
from squall.errors import InvalidRequest
from squall.server import agents
from squall.server.agents import AgentBody, Conversation, text_of
from squall.server.dialect import Event, Section, Sections
from squall.server.errors import MESSAGES, ApiError
from squall.server.schemas import FEW, Message, Parts

_THINKS = {"enabled": {"enable_thinking": True}, "disabled": {"enable_thinking": False}}
_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
# Of each kind of section: the block's type, where a delta has its text, and the delta's type.
_BLOCKS = {
    "text": ("text", "text", "text_delta"),
    "reasoning": ("thinking", "thinking", "thinking_delta"),
    "call": ("tool_use", "partial_json", "input_json_delta"),
}


class CountBody(AgentBody, frozen=True):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[Message], FEW]
    system: Parts | None = None
    tools: Annotated[list[dict[str, Any]], FEW] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def request(self, **fields: Any) -> ChatCompletionRequest:
        """The same as a chat."""
        choice, output = self.tool_choice or {}, self.output_config or {}
        return self.chat(
            self._said(),
            text_of(self.system or "", "system"),
            tools=agents.tools(self.tools, "custom", "input_schema"),
            tool_choice=agents.tool_choice(self.tool_choice),
            parallel_tool_calls=False if choice.get("disable_parallel_tool_use") else None,
            chat_template_kwargs=_THINKS.get(str((self.thinking or {}).get("type"))),
            reasoning_effort=output.get("effort"),
            response_format=agents.response_format(output.get("format")),
            **fields,
        )

    def _said(self) -> list[agents.Message]:
        said = Conversation()
        for i, message in enumerate(self.messages):
            where, content = f"messages[{i}].content", message.content or ""
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for is_text, run in groupby(blocks, lambda block: block.get("type") == "text"):
                if is_text:
                    said.say(message.role, text_of(list(run), where))
                else:
                    for block in run:
                        _add(said, block, where)
        if said.messages and said.messages[-1]["role"] == "assistant":
            raise InvalidRequest("messages must not end with an assistant's; give a user's")
        return said.messages


class MessagesBody(CountBody, frozen=True):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None

    def request(self, **fields: Any) -> ChatCompletionRequest:
        return super().request(max_tokens=self.max_tokens, stop=self.stop_sequences, **fields)


def _add(said: Conversation, block: dict[str, Any], where: str) -> None:
    match block:
        case {"type": "thinking", "thinking": str(text)}:
            said.think(text)
        case {"type": "redacted_thinking"}:
            pass
        case {"type": "tool_use", "id": str(id), "name": str(name), "input": dict(arguments)}:
            said.call(id, name, json.dumps(arguments, ensure_ascii=False))
        case {"type": "tool_result", "tool_use_id": str(id)}:
            error = "error: " if block.get("is_error") is True else ""
            said.result(id, error + text_of(block.get("content") or "", where))
        case _:
            raise InvalidRequest(
                f"{where} has {shown(block)}; blocks are text, thinking, tool_use of id, name and "
                "input, or tool_result of tool_use_id and content"
            )


class Messages(Sections):
    """Tells an answer as a message."""

    prefix = "msg"
    silence = b'event: ping\ndata: {"type": "ping"}\n\n'

    def begin(self) -> Iterable[Event]:
        yield {"type": "message_start", "message": self._message([])}

    def open(self, section: Section) -> Iterable[Event]:
        index, block = section.index, _block(section)
        yield {"type": "content_block_start", "index": index, "content_block": block}

    def more(self, section: Section, text: str) -> Iterable[Event]:
        _, name, type = _BLOCKS[section.kind]
        delta = {"type": type, name: text}
        yield {"type": "content_block_delta", "index": section.index, "delta": delta}

    def close(self, section: Section) -> Iterable[Event]:
        yield {"type": "content_block_stop", "index": section.index}

    def finish(self) -> Iterable[Event]:
        yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def failure(self, error: ApiError) -> Event:
        event: Event = json.loads(error.body(MESSAGES))
        return event

    def final(self) -> dict[str, Any]:
        return self._message(list(map(_block, self.sections))) | self._stop()

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": content, "stop_reason": None, "stop_sequence": None, "usage": self._usage(),
        }  # fmt: skip

    def _stop(self) -> dict[str, Any]:
        return {"stop_reason": _REASONS.get(self.finish_reason or ""), "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Prompt tokens that were cached count apart."""
        usage = self.usage
        if usage is None:
            return {"input_tokens": 0, "output_tokens": 0}
        thought = usage.completion_tokens_details.reasoning_tokens
        cached = usage.prompt_tokens_details.cached_tokens
        return {
            "input_tokens": usage.prompt_tokens - cached, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached, "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": thought},
        }  # fmt: skip


def _block(section: Section) -> dict[str, Any]:
    type, name, _ = _BLOCKS[section.kind]
    if section.kind == "call":
        arguments = _arguments(section.text)
        return {"type": type, "id": section.call_id, "name": section.name, "input": arguments}
    signed = {"signature": ""} if section.kind == "reasoning" else {}
    return {"type": type, name: section.text, **signed}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; of those that are cut as much as clients make of a stream's."""
    try:
        found = from_json(text, allow_partial=True, allow_inf_nan=False)
        json.dumps(found, allow_nan=False)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
