"""One request in the engine: what its sampled tokens mean, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from squall.engine.request import FinishReason, Logits, Piece, Progress, Request, Usage
from squall.engine.sampling import RowSampling, Sampled, SamplerState
from squall.engine.scheduler import Chunk

Sink = Callable[[Piece], None]


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


class Answer:
    """What `Engine.submit` gives: `cancel`, `usage`, and `finish_reason` once it is over.

    Everything else belongs to the engine's thread.
    """

    def __init__(  # noqa: PLR0913
        self,
        request: Request,
        progress: Progress,
        stream: Stream,
        sink: Sink,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        on_cancel: Callable[[Answer], None],
    ) -> None:
        self.request = request
        self.progress = progress
        self.usage = Usage(len(progress.tokens), dropped_tokens=len(request.ids))
        self.usage.dropped_tokens -= len(progress.tokens)
        self.finish_reason: FinishReason | None = None
        self.max_tokens = max_tokens
        self._stream = stream
        self._sink = sink
        self._stop_ids = stop_ids
        self._on_cancel = on_cancel
        self._sampler = SamplerState(request.sampling, progress.tokens)
        self._row = RowSampling(self._sampler, (), request.logprobs)
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[Sampled] = []
        self._since_s = time.perf_counter()
        self._started = False

    def cancel(self) -> None:
        """End it before the next step; a request that is over stays as it is. Any thread may."""
        if self.finish_reason is None:
            self._on_cancel(self)

    def waited_s(self) -> float:
        """Since when it waits to begin; 0 if it has begun."""
        return 0.0 if self._started else time.perf_counter() - self._since_s

    def start(self, chunk: Chunk) -> int:
        """A step is about to compute a chunk of it; if it is the first, how much was cached."""
        if self._started:
            return 0
        self._started = True
        self.usage.cached_tokens = chunk.start
        self.usage.queue_s = self._lap()
        return chunk.start

    def tell_logits(self, chunk: Chunk, rows: Logits) -> None:
        """Hand over logits of the prompt, if they are wanted."""
        wanted = self.usage.prompt_tokens - chunk.outputs.start
        if self.request.scoring is not None and wanted > 0 and len(rows):
            self.request.scoring.take(chunk.outputs.start, rows[:wanted])

    def row(self) -> RowSampling:
        """How its next token is drawn."""
        few = self.usage.answer_tokens < self.request.sampling.min_tokens
        return replace(self._row, banned=tuple(self._stop_ids)) if few else self._row

    def push(self, sampled: Sampled) -> FinishReason | None:
        """Go on with a sampled token; why the answer ends with it, if it does."""
        token, usage = sampled.token, self.usage
        if usage.answer_tokens:
            usage.answer_s += self._lap()
        else:
            usage.prompt_s = self._lap()
        usage.answer_tokens += 1
        self.progress.tokens.append(token)
        self._sampler.append(token)
        self._ids.append(token)
        if self.request.logprobs is not None:
            self._logprobs.append(sampled)
        if token in self._stop_ids:
            return "stop"
        self._text += self._stream.push(token)
        if self._stream.stopped:
            return "stop"
        return "length" if usage.answer_tokens == self.max_tokens else None

    def tell(self, reason: FinishReason | None = None, error: Exception | None = None) -> None:
        """Give the sink what is new: text, if there is some, and the end."""
        if reason is not None:
            self._text += self._stream.finish()
        elif not self._text:
            return
        piece = Piece(self._text, tuple(self._ids), reason, tuple(self._logprobs), error)
        self._text = ""
        self._ids.clear()
        self._logprobs.clear()
        self.finish_reason = reason
        self._sink(piece)

    def _lap(self) -> float:
        now_s = time.perf_counter()
        lap_s, self._since_s = now_s - self._since_s, now_s
        return lap_s
