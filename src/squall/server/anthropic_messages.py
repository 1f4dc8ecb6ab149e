"""Anthropic's Messages: the body, the chat that it is, and its answer as object and events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from squall.api.messages import MOST_MESSAGES, content_of, joined
from squall.api.requests import ChatCompletionRequest
from squall.engine.fields import shown
from squall.errors import InvalidRequest
from squall.server import agents
from squall.server.agents import AgentBody, Object
from squall.server.dialect import Event, Section, Sections
from squall.server.errors import MESSAGES
from squall.server.schemas import Message, Parts

_THINKS = {"enabled": {"enable_thinking": True}, "disabled": {"enable_thinking": False}}
_CHOICES = {"any": "required", "tool": "function"}
_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
# Of each kind of section: the block's type, where a delta has its text, and the delta's type.
_BLOCKS = {
    "text": ("text", "text", "text_delta"),
    "reasoning": ("thinking", "thinking", "thinking_delta"),
    "call": ("tool_use", "partial_json", "input_json_delta"),
}


class CountBody(AgentBody, frozen=True):
    """POST /v1/messages/count_tokens."""

    tool_type = "custom"

    messages: Annotated[list[Message], Field(max_length=MOST_MESSAGES)]
    system: Parts | None = None
    thinking: Object | None = None
    output_config: Object | None = None
    stop_sequences: list[str] | None = None

    def request(self, **defaults: Any) -> ChatCompletionRequest:
        said: list[Object] = []
        for i, message in enumerate(self.messages):
            content = message.content
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for block in [None] if blocks is None else blocks:
                _add(said, message.role, block, f"messages[{i}].content")
        choice, output, alone = self.tool_choice, self.output_config or {}, False
        if isinstance(choice, dict):
            alone, kind = choice.get("disable_parallel_tool_use") is True, choice.get("type")
            choice = {**choice, "type": _CHOICES.get(str(kind), kind)}
        return self.chat(
            said,
            self.system,
            **defaults,
            tool_choice=choice,
            parallel_tool_calls=False if alone else None,
            chat_template_kwargs=_THINKS.get(str((self.thinking or {}).get("type"))),
            reasoning_effort=output.get("effort"),
            response_format=output.get("format"),
            stop=self.stop_sequences,
            continue_final_message=bool(said) and said[-1]["role"] == "assistant",
        )


class MessagesBody(CountBody, frozen=True):
    """POST /v1/messages."""

    max_tokens: int


def _add(said: list[Object], role: str, block: Any, where: str) -> None:
    match block:
        case {"type": "text", "text": str()} | {"type": "image"}:
            agents.say(said, role, content_of([block], where, role))
        case {"type": "thinking", "thinking": str(text)}:
            agents.turn(said, "assistant")["reasoning_content"] = text
        case {"type": "redacted_thinking"}:
            pass
        case {"type": "tool_use", "id": str(id), "name": str(name), "input": dict(arguments)}:
            agents.call(said, id, name, json.dumps(arguments, ensure_ascii=False))
        case {"type": "tool_result", "tool_use_id": str(id)}:
            result = content_of(block.get("content") or "", where, "tool")
            result = joined("error: ", result) if block.get("is_error") is True else result
            said.append({"role": "tool", "tool_call_id": id, "content": result})
        case _:
            known = "complete blocks of text, image, thinking, tool_use or tool_result"
            raise InvalidRequest(f"{where} has {shown(block)}; it must have {known}")


class Messages(Sections):
    prefix = "msg_"
    silence = b'event: ping\ndata: {"type": "ping"}\n\n'

    def tell(self, what: str, new: str = "") -> Iterator[Event]:
        at = {"index": len(self.sections) - 1}
        match what:
            case "begin":
                yield {"type": "message_start", "message": self.told()}
            case "open":
                block = _block(self.sections[-1])
                yield {"type": "content_block_start", **at, "content_block": block}
            case "more":
                _, name, type = _BLOCKS[self.sections[-1].kind]
                yield {"type": "content_block_delta", **at, "delta": {"type": type, name: new}}
            case "close":
                yield {"type": "content_block_stop", **at}
            case "end":
                told = self.told()
                stop = {name: told[name] for name in ("stop_reason", "stop_sequence")}
                yield {"type": "message_delta", "delta": stop, "usage": told["usage"]}
                yield {"type": "message_stop"}
            case _:
                yield json.loads(self.error.body(MESSAGES)) if self.error else {}

    def told(self) -> Object:
        used = {"input_tokens": 0, "output_tokens": 0}
        if usage := self.usage:  # in which cached tokens count apart
            cached = usage.prompt_tokens_details.cached_tokens
            used = {
                "input_tokens": usage.prompt_tokens - cached, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached, "output_tokens": usage.completion_tokens,
            }  # fmt: skip
        reason = _REASONS.get(self.finish_reason or "")
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": list(map(_block, self.sections)), "usage": used,
            "stop_reason": "stop_sequence" if self.stopped else reason,
            "stop_sequence": self.stopped or None,
        }  # fmt: skip


def _block(section: Section) -> Object:
    type, name, _ = _BLOCKS[section.kind]
    if section.kind == "call":
        arguments = agents.arguments_of(section.text)
        return {"type": type, "id": section.call_id, "name": section.name, "input": arguments}
    signed = {"signature": ""} if section.kind == "reasoning" else {}
    return {"type": type, name: section.text, **signed}
