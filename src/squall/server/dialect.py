"""How an endpoint tells an answer: as one JSON object, or as a stream of events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from squall.api.jobs import Job
from squall.api.responses import ChatCompletionChunkResponse, Usage
from squall.server.errors import ApiError

AnyJob = Job[Any, Any, Any]


class Running(Protocol):
    """A job, of text or of pictures, which have no usage."""

    @property
    def usage(self) -> Usage | None: ...

    def chunks_async(self) -> AsyncIterator[Any]: ...

    def close(self) -> None: ...


Event = dict[str, Any]


class Dialect:
    """OpenAI's chats: what the API gives is what is sent."""

    prefix = "chatcmpl-"
    media_type = "text/event-stream; charset=utf-8"  # of a stream
    silence = b": keep-alive\n\n"  # what a stream gets while there is nothing to tell

    def __init__(self, body: Any, model: str, id: str) -> None:
        self.body = body
        self.model = model
        self.id = f"{self.prefix}{id}"

    def request(self, **defaults: Any) -> Any:
        return self.body.request(**defaults)

    async def whole(self, job: Any) -> str:
        return str((await job.response_async()).to_json())

    def part(self, job: Any, chunk: Any) -> bytes:  # noqa: ARG002
        """What a chunk is in a stream."""
        return f"data: {chunk.to_json()}\n\n".encode()

    def end(self, job: Any) -> bytes:  # noqa: ARG002
        """What comes after the last chunk."""
        return b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        """What ends a stream in its middle."""
        return f"data: {error.body()}\n\n".encode()


class Completions(Dialect):
    """OpenAI's completions."""

    prefix = "cmpl-"


@dataclass
class Section:
    """A part of an answer: "reasoning", "text", or a "call" of a tool with its arguments."""

    kind: str
    index: int
    call_id: str
    name: str
    text: str = ""
    status: str = "in_progress"


class Sections(Dialect, ABC):
    """An answer told section by section, one after the other, each with events of its own.

    A whole answer is what the events have made, so that both are the same.
    """

    def __init__(self, body: Any, model: str, id: str) -> None:  # noqa: ARG002
        self.hex = uuid.uuid4().hex  # as clients may give a request's id twice
        super().__init__(body, model, self.hex)
        self.created = int(time.time())
        self.sections: list[Section] = []
        self.finish_reason: str | None = None
        self.usage: Usage | None = None  # None: not begun
        self.error: ApiError | None = None
        self.stopped = ""

    @abstractmethod
    def tell(self, what: str, new: str = "") -> Iterator[Event]:
        """Events: "begin", "open", "more" or "close" for the last section, "end" or "failed"."""

    @abstractmethod
    def told(self) -> dict[str, Any]:
        """The answer so far."""

    async def whole(self, job: AnyJob) -> str:
        async for chunk in job.chunks_async():
            self.part(job, chunk)
        self.end(job)
        return json.dumps(self.told())

    def part(self, job: AnyJob, chunk: Any) -> bytes:
        return _encoded(self._take(job, chunk))

    def end(self, job: AnyJob) -> bytes:
        # Clients look for a text without asking whether there is one.
        nothing = [] if self.sections else self._open("text")
        self.usage, self.stopped = job.usage, job.stopped
        return _encoded([*nothing, *self._close(), *self.tell("end")])

    def failed(self, error: ApiError) -> bytes:
        begin = [] if self.usage else list(self.tell("begin"))
        self.error, self.finish_reason = error, "error"
        return _encoded([*begin, *self._close(), *self.tell("failed")])

    def _take(self, job: AnyJob, chunk: ChatCompletionChunkResponse) -> Iterator[Event]:
        if self.usage is None:
            self.usage = job.usage
            yield from self.tell("begin")
        for choice in chunk.choices:
            yield from self._more("reasoning", choice.delta.reasoning_content)
            yield from self._more("text", choice.delta.content or "")
            for call in choice.delta.tool_calls:
                if call.id is not None:
                    yield from self._open("call", call.id, call.function.name)
                yield from self._more("call", call.function.arguments)
            self.finish_reason = choice.finish_reason or self.finish_reason

    def _more(self, kind: str, text: str) -> Iterator[Event]:
        if text:
            if not self.sections or self.sections[-1].kind != kind:
                yield from self._open(kind)
            self.sections[-1].text += text
            yield from self.tell("more", text)

    def _open(self, kind: str, id: str = "", name: str = "") -> Iterator[Event]:
        yield from self._close()
        self.sections.append(Section(kind, len(self.sections), id, name))
        yield from self.tell("open")

    def _close(self) -> Iterator[Event]:
        if self.sections:
            whole = self.finish_reason in (None, "stop", "tool_calls")
            self.sections[-1].status = "completed" if whole else "incomplete"
            yield from self.tell("close")


def _encoded(events: Iterable[Event]) -> bytes:
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)
