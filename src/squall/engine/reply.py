"""One request in the engine: what its sampled tokens mean, and who is told."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, takewhile

from squall.engine.request import FinishReason, Logits, Piece, Usage
from squall.engine.sampling import RowSampling, Sampled, SamplerState
from squall.engine.scheduler import Chunk
from squall.engine.sequence import Sequence
from squall.text.stream import TextStream

Sink = Callable[[Piece], None]


class Reply:
    """What `Engine.submit` gives: `cancel`, `usage`, and `finish_reason` once it is over.

    Everything else belongs to the engine's thread.
    """

    def __init__(
        self,
        sequence: Sequence,
        stream: TextStream,
        sink: Sink,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        on_cancel: Callable[[Reply], None],
    ) -> None:
        self.request = request = sequence.request
        self.sequence = sequence
        self.usage = Usage(len(sequence.tokens), dropped_tokens=len(request.ids))
        self.usage.dropped_tokens -= len(sequence.tokens)
        self.finish_reason: FinishReason | None = None
        self.max_tokens = max_tokens
        self._stream = stream
        self._sink = sink
        self._stop_ids = stop_ids
        self._on_cancel = on_cancel
        self._sampler = SamplerState(request.sampling, sequence.tokens)
        self._row = RowSampling(self._sampler, (), request.logprobs)
        # What the constraint has prepared, a draw each.
        self._banned: deque[list[int]] = deque()
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
        scoring, start = self.request.scoring, chunk.outputs.start
        if scoring is not None and len(rows) and start < self.usage.prompt_tokens:
            scoring.take(start, rows[: self.usage.prompt_tokens - start])

    def propose(self, most: int, vocab: int) -> list[int]:
        """What the proposer says may follow, as far as it can be drawn."""
        # The last token is drawn after the others, and nothing is drawn after it.
        most = min(most, self.max_tokens - self.usage.answer_tokens - 1)
        if self.request.proposer is None or most < 1:
            return []
        found = self.request.proposer(self.sequence.tokens, most)
        guesses = list(takewhile(range(vocab).__contains__, array("i", islice(found, most))))
        self.usage.guessed_tokens += len(guesses)
        return guesses

    def prepare(self) -> None:
        """Ask the constraint what must not come next, nor after the guesses. Any thread may."""
        known, guesses = self.sequence.tokens, self.sequence.guesses
        assert self.request.constraint is not None
        found = (self.request.constraint(known, guesses[:i]) for i in range(len(guesses) + 1))
        self._banned = deque(array("i", ids).tolist() for ids in found)

    def row(self) -> RowSampling:
        """How its next token is drawn."""
        banned = self._banned.popleft() if self._banned else []
        if self.usage.answer_tokens < self.request.sampling.min_tokens:
            banned += self._stop_ids
        return replace(self._row, banned=banned) if banned else self._row

    def push(self, sampled: Sampled) -> FinishReason | None:
        """Go on with a sampled token; why the answer ends with it, if it does."""
        token, usage = sampled.token, self.usage
        if usage.answer_tokens:
            usage.answer_s += self._lap()
        else:
            usage.prompt_s = self._lap()
        usage.answer_tokens += 1
        self._sampler.append(token)
        self._ids.append(token)
        if self.request.logprobs is not None:
            self._logprobs.append(sampled)
        stopped = token in self._stop_ids
        if not stopped:
            self._text += self._stream.push(token)
            stopped = self._stream.stopped
        if not stopped and usage.answer_tokens < self.max_tokens:
            return None
        self._text += self._stream.finish()
        return "stop" if stopped else "length"

    def tell(self, reason: FinishReason | None = None, error: Exception | None = None) -> None:
        """Give the sink what is new: text, if there is some, and the end."""
        if reason is None and not self._text:
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
