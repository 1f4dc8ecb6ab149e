"""Tokens to text as they come: never half a character, never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence, Set

from squall.errors import InvalidRequest
from squall.text.tokenizer import Tokenizer


class TextStream:
    """Text that is safe to show after each token; all of it together is the decoded text.

    `at_start=False` says that the tokens go on with a text, so that a leading space is part of it.
    shown: control tokens whose names are text here.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        at_start: bool = True,
        shown: Set[int] = frozenset(),
    ) -> None:
        self.stopped = ""  # the stop string that has come
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [_Matcher(text) for text in stop]
        self._held = ""
        self._space = b""  # not a part of the text if it ends here
        self._at_start = at_start
        self._shown = shown

    def push(self, token: int) -> str:
        """The text that became certain with this token; other control tokens have none."""
        if self.stopped:
            return ""
        special = self._tokenizer.is_special(token)
        if special and token not in self._shown:
            self._at_start = self._at_start or self._tokenizer.space_after_control
            return ""
        part = self._space + self._tokenizer.token_bytes(token, first=self._at_start)
        self._at_start = special and self._tokenizer.space_after_control
        self._space = b" " if self._tokenizer.space_suffix and part.endswith(b" ") else b""
        return self._release(self._utf8.decode(part.removesuffix(self._space)))

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if not self._stops:
            return text
        text, seen = self._held + text, len(self._held)
        for end in range(seen, len(text)):
            # All matchers see each character, so the first stop string to be complete wins.
            done = [stop.length for stop in self._stops if stop.feed(text[end])]
            if done:
                start, self._held = end + 1 - max(done), ""
                self.stopped = text[start : end + 1]
                return text[:start]
        kept = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[kept:]
        return text[:kept]


class _Matcher:
    """Knuth-Morris-Pratt: how much of the stop string the text so far ends with."""

    def __init__(self, text: str) -> None:
        if not text:
            raise InvalidRequest("a stop string must not be empty")
        self.length = len(text)
        self.matched = 0
        self._text = text
        self._shorter = [0]  # for each prefix, its longest proper suffix that is a prefix too
        for character in text[1:]:
            self._shorter.append(self._next(self._shorter[-1], character))

    def feed(self, character: str) -> bool:
        """Takes the next character; whether the stop string is now complete."""
        self.matched = self._next(self.matched, character)
        return self.matched == self.length

    def _next(self, matched: int, character: str) -> int:
        while matched and self._text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self._text[matched] == character)
