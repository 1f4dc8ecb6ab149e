"""Answers made up: chunks as a job has them, and what a dialect tells of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import httpx

from squall.api.responses import (
    CalledFunction,
    ChatCompletionChunkResponse,
    ChunkChoice,
    CompletionTokensDetails,
    Delta,
    PromptTokensDetails,
    ToolCallDelta,
    Usage,
)
from squall.server.dialect import Sections

USAGE = Usage(7, 20, 27, 1, 1, 1, 1, 1, 1, PromptTokensDetails(16), CompletionTokensDetails(3))


def says(text: str) -> list[Delta]:
    """A text, a character at a time."""
    return [Delta(content=character) for character in text]


def thinks(text: str) -> list[Delta]:
    """Reasoning, a character at a time."""
    return [Delta(content=None, reasoning_content=character) for character in text]


def calls(index: int, name: str, arguments: str) -> list[Delta]:
    """A call, its arguments a character at a time."""
    begun = ToolCallDelta(index, CalledFunction(name), f"call_{index}", "function")
    parts = [begun, *(ToolCallDelta(index, CalledFunction("", part)) for part in arguments)]
    return [Delta(content=None, tool_calls=(part,)) for part in parts]


ANSWERS: dict[str, tuple[list[Delta], str]] = {
    "text": (says("Hëllo 😀\n"), "stop"),
    "cut text": (says("Hel"), "length"),
    "nothing": ([], "stop"),
    "nothing, cut": ([], "length"),
    "reasoning": (thinks("Hm."), "stop"),
    "cut reasoning": (thinks("Hm"), "length"),
    "reasoning and text": (thinks("Hm.") + says("Yes"), "stop"),
    "a call": (calls(0, "add", '{"a": 1, "b": [2.5, "x"]}'), "tool_calls"),
    "a call without arguments": (calls(0, "now", "{}"), "tool_calls"),
    "a call without a word": (calls(0, "now", ""), "tool_calls"),
    "text and calls": (
        says("I look.") + calls(0, "f", '{"x": "é"}') + calls(1, "f", '{"x": "b"}'),
        "tool_calls",
    ),
    "all": (thinks("So") + says("A") + calls(0, "f", "{}") + says("B"), "tool_calls"),
    **{
        f"a call cut at {at}": (calls(0, "f", '{"a": [1, {"b": "c d"}], "e": true}'[:at]), "length")
        for at in range(34)
    },
}


@dataclass
class MadeUp:
    """A job."""

    deltas: Sequence[Delta]
    finish_reason: str = "stop"
    usage: Usage = USAGE
    stopped: str = ""

    async def chunks_async(self) -> AsyncIterator[ChatCompletionChunkResponse]:
        for delta in (Delta(role="assistant"), *self.deltas):
            yield _chunk(ChunkChoice(None, 0, delta, None))
        yield _chunk(ChunkChoice(self.finish_reason, 0, Delta(), None))


def _chunk(choice: ChunkChoice) -> ChatCompletionChunkResponse:
    return ChatCompletionChunkResponse("id", (choice,), 0, "m")


def streamed(told: Sections, job: MadeUp) -> bytes:
    """What a client would get."""

    async def parts() -> bytes:
        found = b""
        async for chunk in job.chunks_async():
            found += told.part(job, chunk)  # type: ignore[arg-type]
        return found + told.end(job)  # type: ignore[arg-type]

    return asyncio.run(parts())


def transport(content: bytes, of: ModuleType = httpx) -> Any:
    """A client that gets these events, whatever it asks for; `of` is httpx or httpx2."""

    def answer(_: Any) -> Any:
        return of.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    return of.Client(transport=of.MockTransport(answer))
