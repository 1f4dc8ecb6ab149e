"""Tokens of an answer with their log-probabilities, and where in its text they begin."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from squall.api.responses import CompletionLogprobs, Logprobs, ResponseLogprob, TopLogprob
from squall.engine.request import Logits, Piece
from squall.engine.sampling import RowSampling, SamplerState, Sampling, sample_rows
from squall.text.stream import TextStream
from squall.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI's API says this instead.
LEAST = -9999.0


class Entry(NamedTuple):
    """A token, the likeliest in its place, and the character at which it begins."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


class PromptScores:
    """Log-probabilities of the tokens of a prompt; the engine tells the logits."""

    def __init__(self, ids: Sequence[int], top: int) -> None:
        self.found: list[tuple[int, float | None, tuple[tuple[int, float], ...]]] = [
            (ids[0], None, ())
        ]
        self._ids = ids
        self._row = RowSampling(SamplerState(Sampling(temperature=0, seed=0), ()), (), top)

    def take(self, first: int, rows: Logits) -> None:
        targets = self._ids[first + 1 : first + 1 + len(rows)]
        likeliest = sample_rows(rows[: len(targets)], [self._row] * len(targets))
        for row, target, best in zip(rows, targets, likeliest, strict=False):
            if isinstance(best, Exception):
                raise best
            below = float(row[target]) - float(row[best.token])
            self.found.append((target, below + (best.logprob or 0.0), best.top))


class Tokens:
    """The tokens of one answer, as far as they are known.

    wanted: whether anybody wants to see them; if not, only their mean is kept.
    at_start, shown: as in `TextStream`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, wanted: bool, at_start: bool, shown: Set[int] = frozenset()
    ) -> None:
        self.entries: list[Entry] = []
        self._wanted = wanted
        self._stream = TextStream(tokenizer, at_start=at_start, shown=shown)
        self._length = 0
        self._told = self._prompt = 0
        self._sum, self._count = 0.0, 0

    @property
    def mean(self) -> float:
        """The mean log-probability of the sampled tokens."""
        return self._sum / max(self._count, 1)

    def add_prompt(self, scores: PromptScores) -> None:
        for token, logprob, top in scores.found:
            self._add(token, logprob, top)
        self._prompt = len(self.entries)

    def take(self, piece: Piece, length: int) -> None:
        """A piece has come, with which the text has `length` characters."""
        for sampled in piece.logprobs:
            self._sum += sampled.logprob or 0.0
            self._count += 1
            if self._wanted:
                self._add(sampled.token, sampled.logprob, sampled.top)
        if piece.finish_reason == "stop":
            # End tokens have no text, and that of a stop string was cut off.
            while len(self.entries) > self._prompt and self.entries[-1].offset >= length:
                self.entries.pop()

    def news(self, length: int, *, done: bool) -> list[Entry]:
        """Entries not asked for before; unless all is `done`, those that begin in the text."""
        start = self._told
        while self._told < len(self.entries) and (done or self.entries[self._told].offset < length):
            self._told += 1
        return self.entries[start : self._told]

    def _add(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> None:
        self.entries.append(Entry(token, logprob, top, self._length))
        self._length += len(self._stream.push(token))


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[Entry]) -> Logprobs:
    return Logprobs(
        tuple(
            ResponseLogprob(
                *_described(tokenizer, entry.token, entry.logprob),
                tuple(TopLogprob(*_described(tokenizer, *top)) for top in entry.top),
            )
            for entry in entries
        )
    )


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[Entry]) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=tuple(_name(_bytes(tokenizer, entry.token)) for entry in entries),
        token_logprobs=tuple(
            None if entry.logprob is None else _finite(entry.logprob) for entry in entries
        ),
        top_logprobs=tuple(_table(tokenizer, entry) for entry in entries),
        text_offset=tuple(entry.offset for entry in entries),
    )


def _table(tokenizer: Tokenizer, entry: Entry) -> dict[str, float] | None:
    """The likeliest tokens and, as OpenAI has it, the token itself."""
    if entry.logprob is None:
        return None
    table: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        table.setdefault(_name(_bytes(tokenizer, token)), _finite(logprob))
    return table


def _described(
    tokenizer: Tokenizer, token: int, logprob: float | None
) -> tuple[str, float, tuple[int, ...]]:
    data = _bytes(tokenizer, token)
    return data.decode("utf-8", "replace"), _finite(logprob), tuple(data)


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    # A model may have more logits than tokens.
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def _name(data: bytes) -> str:
    """A token's text; where it is no whole characters, its bytes in OpenAI's notation."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and logprob > LEAST else LEAST
