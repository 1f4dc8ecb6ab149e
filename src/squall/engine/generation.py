"""One answer, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

from squall.engine.context import Context
from squall.engine.sampling import RowSampling, SamplerState, Sampling, sample_rows
from squall.errors import SamplingFailed

FinishReason = Literal["stop", "length", "aborted"]


class Stream(Protocol):
    """Turns token ids into text that is safe to show; see `squall.text.stream`."""

    @property
    def stopped(self) -> bool:
        """A stop string was hit."""
        ...

    def push(self, token: int, /) -> str:
        """The text that became certain with this token."""
        ...

    def finish(self) -> str:
        """The text held back so far."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Text, the ids sampled since the last piece, and in the last piece why the answer ended."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Usage:
    """Tokens and seconds of one answer; `cached_tokens` of the prompt were in the KV cache."""

    prompt_tokens: int
    cached_tokens: int = 0
    answer_tokens: int = 0
    prompt_s: float = 0.0
    answer_s: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed a second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_s if self.prompt_s else 0.0

    @property
    def answer_rate(self) -> float:
        """Tokens a second after the first, which belongs to the prompt's step."""
        return (self.answer_tokens - 1) / self.answer_s if self.answer_s else 0.0


class Generation(Iterator[Piece]):
    """An iterator of pieces. Stopping early is `close()`, or just not asking for more.

    `finish_reason`: "stop" (an end token or a stop string), "length" (max_tokens or the context is
    used up), "aborted" (closed before the end), None while running.
    """

    def __init__(
        self,
        context: Context,
        prompt: Sequence[int],
        stream: Stream,
        *,
        sampling: Sampling,
        max_tokens: int,
        stop_ids: frozenset[int],
    ) -> None:
        self.sampling = sampling
        self.usage = Usage(len(prompt))
        self.finish_reason: FinishReason | None = None
        self._context = context
        self._stream = stream
        self._ids = list(prompt)
        self._state = SamplerState(sampling, prompt)
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids

    @property
    def seed(self) -> int:
        """The seed in use: given, or chosen for this answer."""
        return self.sampling.seed

    @property
    def ids(self) -> list[int]:
        """The ids sampled so far."""
        return self._ids[self.usage.prompt_tokens :]

    def __next__(self) -> Piece:
        ids: tuple[int, ...] = ()
        while self.finish_reason is None:
            token = self._sample()
            ids += (token,)
            if token in self._stop_ids:
                return self._end("stop", "", ids)
            text = self._stream.push(token)
            if self._stream.stopped:
                return self._end("stop", text, ids)
            if self.usage.answer_tokens == self._max_tokens:
                return self._end("length", text, ids)
            if text:
                return Piece(text, ids)
        raise StopIteration

    def read(self) -> str:
        """The rest of the answer as one string."""
        return "".join(piece.text for piece in self)

    def close(self) -> None:
        """Stop here. The model keeps what was computed, so that a follow-up is cheap."""
        if self.finish_reason is None:
            self._end("aborted", "", ())

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _sample(self) -> int:
        start_s = time.perf_counter()
        logits, cached = self._context.advance(self._ids)
        (sampled,) = sample_rows(logits[None], [RowSampling(self._state)])
        if isinstance(sampled, SamplingFailed):
            raise sampled
        token = sampled.token
        elapsed_s = time.perf_counter() - start_s
        if self.usage.answer_tokens == 0:
            self.usage.cached_tokens = cached
            self.usage.prompt_s = elapsed_s
        else:
            self.usage.answer_s += elapsed_s
        self.usage.answer_tokens += 1
        self._ids.append(token)
        self._state.append(token)
        return token

    def _end(self, reason: FinishReason, text: str, ids: tuple[int, ...]) -> Piece:
        self.finish_reason = reason
        self._context.release(self._ids)
        return Piece(text + self._stream.finish(), ids, reason)
