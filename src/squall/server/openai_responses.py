"""OpenAI's Responses: the body, the chat that it is, and its answer as object and events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from squall.api.messages import content_of
from squall.api.requests import ChatCompletionRequest
from squall.engine.fields import shown
from squall.errors import InvalidRequest
from squall.server import agents
from squall.server.agents import AgentBody, Object
from squall.server.dialect import Event, Section, Sections
from squall.server.kept import Kept
from squall.server.schemas import Parts

MOST_METADATA = 16
# What responses repeat of their requests, and what they say of what was not given.
_ASKED: Object = {
    "background": False, "instructions": None, "max_output_tokens": None, "metadata": {},
    "parallel_tool_calls": True, "previous_response_id": None, "reasoning": {}, "store": True,
    "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
    "top_p": None, "truncation": None,
}  # fmt: skip
_IDS = {"text": "msg", "reasoning": "rs", "call": "fc"}
_EVENTS = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}
_CUT = {"reason": "max_output_tokens"}
_CACHE = {"cache_write_tokens": 0}
_STATUS = {None: "in_progress", "error": "failed", "length": "incomplete", "canceled": "incomplete"}


class ResponsesBody(AgentBody, frozen=True):
    """POST /v1/responses."""

    tool_type = "function"

    input: Parts
    instructions: str | None = None
    previous_response_id: str | None = None
    text: Object | None = None
    reasoning: Object | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MOST_METADATA)] | None = None
    background: Literal[False] | None = None
    conversation: None = None
    prompt: None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None

    def after(self, said: list[Object], **defaults: Any) -> ChatCompletionRequest:
        """What follows all this, as a chat."""
        if self.truncation is not None:
            defaults["truncate_sequence"] = self.truncation == "auto"
        return self.chat(
            said,
            self.instructions,
            **defaults,
            max_tokens=self.max_output_tokens,
            response_format=(self.text or {}).get("format"),
            reasoning_effort=(self.reasoning or {}).get("effort"),
        )


def _add(said: list[Object], item: Object, where: str) -> None:
    match item:
        case {"type": "function_call", "call_id": str(id), "name": str(name)}:
            agents.call(said, id, name, item.get("arguments", ""))
        case {"type": "function_call_output", "call_id": str(id), "output": output}:
            result = content_of(output, f"{where}.output", "tool")
            said.append({"role": "tool", "tool_call_id": id, "content": result})
        case {"type": "reasoning", "content": [{"text": str(text)}, *_]}:
            agents.turn(said, "assistant")["reasoning_content"] = text
        case {"type": "reasoning"}:  # of another server, which has not told it
            pass
        case {"role": str(role), "content": str() | [*_] as content, **rest} if (
            rest.get("type", "message") == "message"
        ):
            told = content_of(content, f"{where}.content", role)
            agents.say(said, role, told, new=role != "assistant")
        case _:
            known = "a complete message, function_call, function_call_output or reasoning"
            raise InvalidRequest(f"{where} is {shown(item)}; it must be {known}")


class Responses(Sections):
    prefix = "resp_"
    body: ResponsesBody

    def __init__(self, kept: Kept, tenant: str, body: ResponsesBody, *others: str) -> None:
        super().__init__(body, *others)
        name, id = "previous_response_id", body.previous_response_id
        self._previous = kept.find(tenant, id, name) if id else (b'{"output": []}', b"[]")
        self._keep = partial(kept.keep, tenant, self.id)
        self._number = 0

    def request(self, **defaults: Any) -> ChatCompletionRequest:
        given, (response, before) = self.body.input, map(json.loads, self._previous)
        for item in response["output"]:
            _add(before, item, "previous_response_id")
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        for i, item in enumerate(items):
            _add(before, item, f"input[{i}]")
        # Without the instructions, which are for one answer; here, beside the event loop.
        self._said = json.dumps(before).encode()
        return self.body.after(before, **defaults)

    def tell(self, what: str, new: str = "") -> Iterator[Event]:
        if what == "begin":
            yield self._event("created", response=self.told())
            yield self._event("in_progress", response=self.told())
        elif what in ("end", "failed"):
            response = self.told()
            if what == "end" and self.body.store is not False:
                self._keep((json.dumps(response).encode(), self._said))
            yield self._event(response["status"], response=response)
        else:
            yield from self._section_events(self.sections[-1], what, new)

    def told(self) -> Object:
        status, usage, error = _STATUS.get(self.finish_reason, "completed"), self.usage, self.error
        asked = self.body.model_dump_json(include=set(_ASKED), exclude_none=True)
        used = usage and {
            "input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens,
            "input_tokens_details": _CACHE | usage.prompt_tokens_details.to_dict(),
            "output_tokens_details": usage.completion_tokens_details.to_dict(),
            "total_tokens": usage.total_tokens,
        }  # fmt: skip
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": error and {"code": "server_error", "message": error.message},
            "incomplete_details": _CUT if self.finish_reason == "length" else None,
            "model": self.model, "output": list(map(self._item, self.sections)),
            "usage": None if status == "in_progress" else used,
            **_ASKED, **json.loads(asked),
        }  # fmt: skip

    def _section_events(self, section: Section, what: str, new: str) -> Iterator[Event]:
        item, kind, index = self._item(section), _EVENTS[section.kind], section.index
        at, has_part = {"item_id": item["id"], "output_index": index}, section.kind != "call"
        at |= {"content_index": 0} if has_part else {}
        if what == "open":
            yield self._event("output_item.added", output_index=index, item=item)
            if has_part:
                yield self._event("content_part.added", **at, part=_part(section))
        elif what == "more":
            yield self._event(f"{kind}.delta", **at, delta=new)
        else:
            done = {"name": section.name, "arguments": section.text}
            done = {"text": section.text} if has_part else done
            yield self._event(f"{kind}.done", **at, **done)
            if has_part:
                yield self._event("content_part.done", **at, part=_part(section))
            yield self._event("output_item.done", output_index=index, item=item)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        if kind.startswith("output_text"):
            fields["logprobs"] = []
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}

    def _item(self, section: Section) -> Object:
        kind, status = section.kind, section.status
        item: Object = {"id": f"{_IDS[kind]}_{self.hex}_{section.index}", "status": status}
        if kind == "call":
            called = {"name": section.name, "arguments": section.text}
            return {"type": "function_call", **item, "call_id": section.call_id, **called}
        item["content"] = [] if status == "in_progress" else [_part(section)]
        if kind == "reasoning":
            return {"type": "reasoning", **item, "summary": []}
        return {"type": "message", **item, "role": "assistant"}


def _part(section: Section) -> Object:
    part = {"type": _EVENTS[section.kind], "text": section.text}
    return part | ({"annotations": [], "logprobs": []} if section.kind == "text" else {})
