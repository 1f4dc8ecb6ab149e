"""How an endpoint tells an answer: as one JSON object, or as a stream of events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from squall.api.jobs import Job
from squall.api.responses import ChatCompletionChunkResponse, Usage
from squall.server.agents import Conversation
from squall.server.errors import ApiError

AnyJob = Job[Any, Any, Any]
Event = dict[str, Any]


class Dialect:
    """OpenAI's chats and completions: what the API gives is what is sent."""

    silence = b": keep-alive\n\n"  # what a stream gets while there is nothing to tell

    def __init__(self, id: str) -> None:
        self.id = id

    async def whole(self, job: AnyJob) -> str:
        """The complete answer."""
        return str((await job.response_async()).to_json())

    def part(self, job: AnyJob, chunk: Any) -> bytes:  # noqa: ARG002
        """What a chunk is in a stream."""
        return f"data: {chunk.to_json()}\n\n".encode()

    def end(self, job: AnyJob) -> bytes:  # noqa: ARG002
        """What comes after the last chunk."""
        return b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        """What ends a stream in its middle."""
        return f"data: {error.body()}\n\n".encode()


@dataclass
class Section:
    """A part of an answer, of one kind: "reasoning", "text" or "call" (of a tool)."""

    kind: str
    index: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far; of a call the arguments."""
        return "".join(self.texts)

    def add(self, said: Conversation) -> None:
        """Becomes a part of a conversation."""
        if self.kind == "call":
            said.call(self.call_id, self.name, self.text)
        elif self.kind == "reasoning":
            said.think(self.text)
        else:
            said.say("assistant", self.text)


class Sections(Dialect, ABC):
    """An answer told section by section, one after the other, each with events of its own.

    A whole answer is what the events have made, so that both are the same.
    """

    prefix: str

    def __init__(self, model: str) -> None:
        # Not the request's id, which clients may give twice.
        self.hex = uuid.uuid4().hex
        super().__init__(f"{self.prefix}_{self.hex}")
        self.model = model
        self.created = int(time.time())
        self.sections: list[Section] = []
        self.finish_reason: str | None = None
        self.usage: Usage | None = None  # None: not begun

    async def whole(self, job: AnyJob) -> str:
        async for chunk in job.chunks_async():
            self.part(job, chunk)
        self.end(job)
        return json.dumps(self.final())

    def part(self, job: AnyJob, chunk: Any) -> bytes:
        return _encoded(self._take(job, chunk))

    def end(self, job: AnyJob) -> bytes:
        # Clients look for a text without asking whether there is one.
        nothing = [] if self.sections else self._open("text")
        self.usage = job.usage
        return _encoded([*nothing, *self.close(self.sections[-1]), *self.finish()])

    def failed(self, error: ApiError) -> bytes:
        begin = [] if self.usage else self.begin()
        return _encoded([*begin, self.failure(error)])

    def _take(self, job: AnyJob, chunk: ChatCompletionChunkResponse) -> Iterator[Event]:
        if self.usage is None:
            self.usage = job.usage
            yield from self.begin()
        for choice in chunk.choices:
            delta = choice.delta
            for kind, text in (("reasoning", delta.reasoning_content), ("text", delta.content)):
                if text:
                    yield from self._more(kind, text)
            for call in delta.tool_calls:
                if call.id is not None:
                    yield from self._open("call", call.id, call.function.name)
                if call.function.arguments:
                    yield from self._more("call", call.function.arguments)
            self.finish_reason = choice.finish_reason or self.finish_reason

    def _more(self, kind: str, text: str) -> Iterator[Event]:
        if not self.sections or self.sections[-1].kind != kind:
            yield from self._open(kind)
        self.sections[-1].texts.append(text)
        yield from self.more(self.sections[-1], text)

    def _open(self, kind: str, id: str = "", name: str = "") -> Iterator[Event]:
        if self.sections:
            yield from self.close(self.sections[-1])
        self.sections.append(Section(kind, len(self.sections), id, name))
        yield from self.open(self.sections[-1])

    @abstractmethod
    def begin(self) -> Iterable[Event]:
        """Before all else."""

    @abstractmethod
    def open(self, section: Section) -> Iterable[Event]:
        """A section begins."""

    @abstractmethod
    def more(self, section: Section, text: str) -> Iterable[Event]:
        """Something is new in a section."""

    @abstractmethod
    def close(self, section: Section) -> Iterable[Event]:
        """A section is complete, or cut if the answer is over."""

    @abstractmethod
    def finish(self) -> Iterable[Event]:
        """The answer is over."""

    @abstractmethod
    def failure(self, error: ApiError) -> Event:
        """There will be no answer."""

    @abstractmethod
    def final(self) -> dict[str, Any]:
        """The whole answer, once it is over."""


def _encoded(events: Iterable[Event]) -> bytes:
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)
