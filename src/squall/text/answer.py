"""An answer's text into what it says: reasoning, content and calls of tools.

However the text is cut into pieces, the events together say the same.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from squall.text.reasoning import Reasoning
from squall.text.tool_formats import FORMATS, MAX_SPACE, Pattern, ToolFormat

_JSON = re.compile(r'["{}\[\]]|\\.?', re.DOTALL)
_CHUNK = 4096  # characters
_WHITE = " \t\r\n"
_Step = Callable[[], bool]


@dataclass(frozen=True)
class Reasoned:
    text: str


@dataclass(frozen=True)
class Said:
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


@dataclass(kw_only=True)
class AnswerParser:
    """Reads one answer as it comes; holds back only what may be the beginning of a mark.

    What looks like a call and is none, or is one of a tool not in `names`, is content. White space
    around reasoning and before calls is dropped, up to MAX_SPACE characters.
    """

    tools: ToolFormat | None = None
    names: Collection[str] | None = None  # of the tools that may be called; None: any
    reasoning: Reasoning | None = None
    seed: str = ""  # where the ids come from

    def __post_init__(self) -> None:
        self._format = self.tools or FORMATS[-1]
        self._marks = self.reasoning or Reasoning("", "")
        self._seed = self.seed or secrets.token_hex(16)
        self._held = ""
        self._final = False
        self._events: list[Event] = []
        self._calls = 0
        self._depth = 0  # of brackets in the arguments
        self._quoted = False  # whether in a string there
        self._step: _Step = self._start if self.reasoning else self._answer
        self._after = self._step  # once white space has been dropped

    def push(self, text: str, *, final: bool = False) -> list[Event]:
        """The events that became certain with this text; final: no more comes."""
        for start in range(0, max(1, len(text)), _CHUNK):  # what is held stays short
            self._held += text[start : start + _CHUNK]
            self._final = final and start + _CHUNK >= len(text)
            while self._step():
                pass
        events, self._events = self._events, []
        return events

    # Each step takes from what is held; it returns False where it needs more text.

    def _go(self, step: _Step, drop: int = 0, after: _Step | None = None) -> bool:
        self._held = self._held[drop:]
        self._step, self._after = step, after or self._after
        return True

    def _tell(self, event: Callable[[str], Event], end: int) -> None:
        if end > 0:
            self._events.append(event(self._held[:end]))
            self._held = self._held[end:]

    def _until(self, mark: str, event: Callable[[str], Event]) -> bool:
        """Tells all before a mark, without white space there; whether the mark has come."""
        at = end = self._held.find(mark)
        if at < 0:
            sizes = (n for n in range(len(mark), 0, -1) if self._held.endswith(mark[:n]))
            end = len(self._held) - (0 if self._final else next(sizes, 0))
        self._tell(event, end if at < 0 and self._final else _before(self._held, end))
        return at >= 0

    def _gap(self) -> bool:
        space = _space(self._held)
        if space == len(self._held) and space < MAX_SPACE and not self._final:
            return False
        return self._go(self._after, space)

    def _start(self) -> bool:
        """The answer may begin with a mark of reasoning."""
        marks = {self._marks.opening: self._reason, self._marks.closing: self._answer}
        space = _space(self._held)
        rest = self._held[space:]
        for mark, after in marks.items():
            if rest.startswith(mark):
                return self._go(self._gap, space + len(mark), after)
        if space < MAX_SPACE and not self._final and any(mark.startswith(rest) for mark in marks):
            return False
        return self._go(self._gap, 0, self._reason) if self._marks.begun else self._go(self._answer)

    def _reason(self) -> bool:
        closing = self._marks.closing
        if not self._until(closing, Reasoned):
            return False
        return self._go(self._gap, self._held.index(closing) + len(closing), self._answer)

    def _answer(self) -> bool:
        if self.tools is None:
            return self._go(self._content)
        self._format = self.tools.bared
        return self._begun(self._format.bare_first)

    def _content(self) -> bool:
        if self.tools is None:
            self._tell(Said, len(self._held))
            return False
        self._format = self.tools
        return self._until(self._format.opening, Said) and self._go(self._first)

    def _first(self) -> bool:
        return self._begun(self._format.first, self._format.opening)

    def _begun(self, pattern: Pattern, opening: str = "") -> bool:
        """A call begins here; otherwise the opening is content."""
        found = pattern.whole.match(self._held)
        if found and found.end() < len(self._held) and self._begin(found):
            return True
        if pattern.part.fullmatch(self._held) and not (self._final and not opening):
            return self._final and self._go(self._content, len(self._held))
        self._tell(Said, self._held.index(opening) + len(opening))
        return self._go(self._content)

    def _begin(self, found: re.Match[str]) -> bool:
        name = next(filter(None, found.groups()))
        if self._held[found.end()] != "{" or (self.names is not None and name not in self.names):
            return False
        digest = hashlib.blake2b(f"{self._seed}/{self._calls}".encode()).hexdigest()
        id_ = digest[:9] if self._format.short_ids else f"call_{digest[:24]}"
        self._events.append(CallBegun(self._calls, id_, name))
        self._depth, self._quoted = 0, False
        return self._go(self._arguments, found.end())

    def _arguments(self) -> bool:
        end, index = len(self._held), self._calls
        for match in _JSON.finditer(self._held):
            character = match.group()
            if character == "\\" and not self._final:
                end = match.start()  # what it escapes comes later
            elif character == '"':
                self._quoted = not self._quoted
            elif not self._quoted and character in "{}[]":
                self._depth += 1 if character in "{[" else -1
                if not self._depth:
                    end, self._calls = match.end(), index + 1
                    break
        self._tell(partial(CallArguments, index), end)
        if self._calls == index:
            return False
        self._events.append(CallEnded(index))
        return self._go(self._tail)

    def _tail(self) -> bool:
        """After the arguments: another call, or the end of the calls."""
        patterns = [self._format.more, self._format.end]
        found, ended = (pattern and pattern.whole.match(self._held) for pattern in patterns)
        if found and found.end() < len(self._held) and self._begin(found):
            return True
        if any(pattern and pattern.part.fullmatch(self._held) for pattern in patterns):
            return self._final and self._go(self._content, len(self._held))
        return self._go(self._gap, ended.end(), self._content) if ended else self._go(self._content)


def _space(text: str) -> int:
    """How many characters of white space it begins with, up to MAX_SPACE."""
    head = text[:MAX_SPACE]
    return len(head) - len(head.lstrip(_WHITE))


def _before(text: str, at: int) -> int:
    """Where the white space before a place begins that a mark there swallows."""
    head = text[max(0, at - MAX_SPACE) : at]
    return at - len(head) + len(head.rstrip(_WHITE))
