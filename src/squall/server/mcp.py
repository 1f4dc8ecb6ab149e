"""Chats whose calls of MCP tools the server makes itself, until there is an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from squall.api.jobs import ChatJob, start_chat
from squall.api.requests import ChatCompletionRequest
from squall.api.responses import (
    ChatCompletionChunkResponse,
    ChatCompletionResponse,
    ChunkChoice,
    Delta,
    ToolCall,
    Usage,
)
from squall.mcp import MOST_RESULT, McpTools
from squall.model import Model
from squall.server.answer import begun
from squall.server.service import Service

MOST_ROUNDS = 8  # answers with calls; the next one has to be without
MOST_CALLS = 16  # of one answer

Start = Callable[[ChatCompletionRequest], ChatJob]


def start_with_tools(
    service: Service, model: Model, asked: ChatCompletionRequest, **options: Any
) -> ChatJob | Rounds:
    """`start_chat`, with the server's tools for chats that say nothing of tools."""
    start: Start = partial(start_chat, model, **options)
    tools = service.options.mcp
    own = asked.tools or asked.tool_schemas or asked.tool_choice is not None
    other = asked.n > 1 or asked.continue_final_message or asked.structure() is not None
    if tools is None or own or other:
        return start(asked)
    make = partial(_make, tools, model.context)
    return Rounds(service, start, replace(asked, tools=tools.tools), make)


async def _make(tools: McpTools, context: int, calls: tuple[ToolCall, ...], used: int) -> list[str]:
    """The results of calls, of which too many at a time are not made; used: tokens so far."""
    # All together may take about a quarter of what is left of the context.
    most = min(MOST_RESULT, (context - used) // len(calls))
    asked = [(call.function.name, call.function.arguments) for call in calls]
    made = (asyncio.wrap_future(tools.submit(*one, most)) for one in asked[:MOST_CALLS])
    late = f"error: at most {MOST_CALLS} calls at a time are made; call again"
    return [*await asyncio.gather(*made), *[late] * len(asked[MOST_CALLS:])]


class Rounds:
    """A job of several, one after the other: all but the last end with calls of tools."""

    def __init__(
        self, service: Service, start: Start, asked: ChatCompletionRequest,
        make: Callable[[tuple[ToolCall, ...], int], Any],
    ) -> None:  # fmt: skip
        self._service = service
        self._start = start
        self._asked = asked
        self._make = make
        self._job = start(asked)
        self._used: Usage | None = None
        self._trail: list[dict[str, str]] = []
        self._texts: list[tuple[str, str]] = []  # content and reasoning of each round
        self._rounds = MOST_ROUNDS

    @property
    def usage(self) -> Usage:
        return self._job.usage if self._used is None else self._used + self._job.usage

    @property
    def stopped(self) -> str:
        return self._job.stopped

    def close(self) -> None:
        self._job.close()

    async def response_async(self) -> ChatCompletionResponse:
        async for _ in self.chunks_async():
            pass
        found = await self._job.response_async()
        (choice,) = found.choices
        content, reasoning = ("".join(texts) for texts in zip(*self._texts, strict=True))
        message = replace(
            choice.message, content=content, reasoning_content=reasoning, tool_calls=()
        )
        choices = (replace(choice, message=message),)
        trail = tuple(self._trail)
        return replace(found, choices=choices, usage=self.usage, squall_tools=trail)

    async def chunks_async(self) -> AsyncIterator[ChatCompletionChunkResponse]:
        while True:
            calls = False
            async for chunk in self._job.chunks_async():
                calls = calls or any(c.finish_reason == "tool_calls" for c in chunk.choices)
                if not calls and (shown := self._shown(chunk)) is not None:
                    yield shown
            (choice,) = (await self._job.response_async()).choices
            message = choice.message
            self._texts.append((message.content or "", message.reasoning_content))
            if not calls:
                return
            yield await self._go_on(message.to_dict(), message.tool_calls, chunk)

    def _shown(self, chunk: ChatCompletionChunkResponse) -> ChatCompletionChunkResponse | None:
        """What the client gets of a chunk: no calls, and one beginning."""
        if not chunk.choices:
            return replace(chunk, usage=self.usage)
        (choice,) = chunk.choices
        if choice.delta.tool_calls or (self._trail and choice.delta.role):
            return None
        delta = replace(choice.delta, content=choice.delta.content or "")
        return replace(chunk, choices=(replace(choice, delta=delta),))

    async def _go_on(
        self,
        message: dict[str, Any],
        calls: tuple[ToolCall, ...],
        last: ChatCompletionChunkResponse,
    ) -> ChatCompletionChunkResponse:
        """Make the calls, and begin with the next answer; the chunk that tells of them."""
        results = await self._make(calls, self._job.usage.total_tokens)
        pairs = list(zip(calls, results, strict=True))
        told = [
            {"role": "tool", "tool_call_id": call.id, "content": result} for call, result in pairs
        ]
        new = [{**call.function.to_dict(), "result": result} for call, result in pairs]
        self._trail += new
        self._rounds -= 1
        self._used = self.usage
        self._asked = replace(
            self._asked,
            messages=[*self._asked.messages, message, *told],
            tool_choice=None if self._rounds else "none",
        )
        self._job = await begun(self._service.submit(partial(self._start, self._asked)))
        gap = "\n\n" if message["content"] else ""
        self._texts.append((gap, ""))
        choice = ChunkChoice(None, 0, Delta(content=gap), None)
        return replace(last, choices=(choice,), usage=None, squall_tools=tuple(new))
