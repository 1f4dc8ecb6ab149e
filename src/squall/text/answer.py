"""An answer's text into what it says: reasoning, content and calls of tools.

However the text is cut into pieces, the events together say the same.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from squall.text.reasoning import Reasoning
from squall.text.tool_formats import MAX_SPACE, Pattern, ToolFormat

_JSON = re.compile(r'["{}\[\]]|\\.?', re.DOTALL)
_CHUNK = 4096  # characters
_WHITE = " \t\r\n"


@dataclass(frozen=True)
class Reasoned:
    """A part of the reasoning."""

    text: str


@dataclass(frozen=True)
class Said:
    """A part of the content."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call of a tool whose arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A part of a call's arguments, which together are JSON."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """A call is whole; one that was cut has no such event."""

    index: int


Event = Reasoned | Said | CallBegun | CallArguments | CallEnded


class AnswerParser:
    """Reads one answer as it comes; holds back only what may be the beginning of a mark.

    What looks like a call and is none, or is one of a tool not in `names`, is content. White space
    around reasoning and before calls is dropped, up to MAX_SPACE characters.
    """

    def __init__(
        self,
        *,
        tools: ToolFormat | None = None,
        names: Collection[str] | None = None,
        reasoning: Reasoning | None = None,
        seed: str = "",
    ) -> None:
        """names: of the tools that may be called; None: any. seed: where the ids come from."""
        self._tools = tools
        self._names = names
        self._reasoning = reasoning
        self._seed = seed or secrets.token_hex(16)
        self._held = ""
        self._final = False
        self._events: list[Event] = []
        self._calls = 0
        self._depth = 0  # of brackets in the arguments
        self._quoted = False  # whether in a string there
        self._step: Callable[[], bool] = self._start if reasoning else self._answer

    def push(self, text: str, *, final: bool = False) -> list[Event]:
        """The events that became certain with this text; final: no more comes."""
        for start in range(0, max(1, len(text)), _CHUNK):  # what is held stays short
            self._held += text[start : start + _CHUNK]
            self._final = final and start + _CHUNK >= len(text)
            while self._step():
                pass
        events, self._events = self._events, []
        return events

    def _go(self, step: Callable[[], bool], consumed: int) -> bool:
        self._held = self._held[consumed:]
        self._step = step
        return True

    def _say(self, kind: type[Reasoned] | type[Said], end: int) -> None:
        if end > 0:
            self._events.append(kind(self._held[:end]))
            self._held = self._held[end:]

    # Reasoning

    def _start(self) -> bool:
        """The answer may begin with a mark of reasoning."""
        assert self._reasoning
        opening, closing = self._reasoning.opening, self._reasoning.closing
        space = _space(self._held)
        rest = self._held[space:]
        for mark, step in ((opening, self._reason_start), (closing, self._gap)):
            if rest.startswith(mark):
                return self._go(step, space + len(mark))
        if space < MAX_SPACE and not self._final and _begins(rest, (opening, closing)):
            return False
        return self._go(self._reason_start if self._reasoning.begun else self._answer, 0)

    def _reason_start(self) -> bool:
        return self._skip(self._reason)

    def _reason(self) -> bool:
        assert self._reasoning
        closing = self._reasoning.closing
        at = self._held.find(closing)
        if at >= 0:
            self._say(Reasoned, _before(self._held, at))
            return self._go(self._gap, self._held.index(closing) + len(closing))
        self._say(Reasoned, self._certain((closing,)))
        return False

    def _gap(self) -> bool:
        """After reasoning, or a call."""
        return self._skip(self._answer if self._calls == 0 else self._content)

    def _skip(self, step: Callable[[], bool]) -> bool:
        space = _space(self._held)
        if space == len(self._held) and space < MAX_SPACE and not self._final:
            return False
        return self._go(step, space)

    # Content

    def _answer(self) -> bool:
        return self._go(self._bare if self._tools and self._tools.bare else self._content, 0)

    def _content(self) -> bool:
        if self._tools is None:
            self._say(Said, len(self._held))
            return False
        opening = self._tools.opening
        at = self._held.find(opening)
        if at < 0:
            self._say(Said, self._certain((opening,)))
            return False
        self._say(Said, _before(self._held, at))
        return self._go(self._first, 0)

    def _certain(self, marks: tuple[str, ...]) -> int:
        """How much of what is held can neither be a mark nor white space that one swallows."""
        held = self._held
        if self._final:
            return len(held)
        longest = max(map(len, marks))
        start = next(
            (
                i
                for i in range(max(0, len(held) - longest + 1), len(held))
                if _begins(held[i:], marks)
            ),
            len(held),
        )
        return _before(held, start)

    # Calls

    def _bare(self) -> bool:
        assert self._tools
        return self._call(self._tools.bare_first, otherwise=0)

    def _first(self) -> bool:
        assert self._tools
        opening = self._tools.opening
        return self._call(self._tools.first, otherwise=self._held.index(opening) + len(opening))

    def _call(self, pattern: Pattern, *, otherwise: int) -> bool:
        """A call begins, or so many characters are content."""
        found = pattern.whole.match(self._held)
        if (found and found.end() < len(self._held)) or (found and self._final):
            return self._begin(found) or self._no_call(otherwise)
        if not self._final and pattern.part.fullmatch(self._held):
            return False
        return self._no_call(otherwise)

    def _no_call(self, characters: int) -> bool:
        self._say(Said, characters)
        return self._go(self._content, 0)

    def _begin(self, found: re.Match[str]) -> bool:
        name = next(group for group in found.groups() if group)
        if self._names is not None and name not in self._names:
            return False
        if self._held[found.end() : found.end() + 1] != "{":
            return False
        self._events.append(CallBegun(self._calls, self._id(), name))
        self._depth, self._quoted = 0, False
        return self._go(self._arguments, found.end())

    def _id(self) -> str:
        digest = hashlib.blake2b(f"{self._seed}/{self._calls}".encode()).hexdigest()
        assert self._tools
        return digest[:9] if self._tools.short_ids else f"call_{digest[:24]}"

    def _arguments(self) -> bool:
        end = len(self._held)
        for match in _JSON.finditer(self._held):
            character = match.group()
            if character == "\\" and not self._final:
                end = match.start()  # what it escapes comes later
            elif character == '"':
                self._quoted = not self._quoted
            elif not self._quoted and character in "{[":
                self._depth += 1
            elif not self._quoted and character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._told(match.end())
                    self._events.append(CallEnded(self._calls))
                    self._calls += 1
                    return self._go(self._tail, 0)
        self._told(end)
        return False

    def _told(self, end: int) -> None:
        if end:
            self._events.append(CallArguments(self._calls, self._held[:end]))
            self._held = self._held[end:]

    def _tail(self) -> bool:
        """After the arguments: another call, or the end of the calls."""
        assert self._tools
        more, end = self._tools.more, self._tools.end
        found = more.whole.match(self._held) if more else None
        if found and found.end() < len(self._held) and self._begin(found):
            return True
        ended = end.whole.match(self._held)
        waits = [
            pattern for pattern in (more, end) if pattern and pattern.part.fullmatch(self._held)
        ]
        if waits and not self._final:
            return False
        if ended:
            return self._go(self._gap, ended.end())
        return self._go(self._content, len(self._held) if waits else 0)


def _space(text: str) -> int:
    """How many characters of white space it begins with, up to MAX_SPACE."""
    head = text[:MAX_SPACE]
    return len(head) - len(head.lstrip(_WHITE))


def _before(text: str, at: int) -> int:
    """Where the white space before a place begins that a mark there swallows."""
    head = text[max(0, at - MAX_SPACE) : at]
    return at - len(head) + len(head.rstrip(_WHITE))


def _begins(text: str, marks: tuple[str, ...]) -> bool:
    return any(mark.startswith(text) for mark in marks)
