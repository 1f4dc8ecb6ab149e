"""One request in the engine: what its sampled tokens mean, and who is told."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, takewhile

import numpy as np

from squall.engine.request import FinishReason, Logits, Piece, Usage
from squall.engine.sampling import Mask, RowSampling, Sampled, SamplerState
from squall.engine.sequence import Chunk, Sequence
from squall.errors import SamplingFailed
from squall.text.stream import TextStream

Sink = Callable[[Piece], None]
# The share of a matcher for each mask, and how far it may be over; seconds that its thread worked.
MASK_S, OVER_S = 0.005, 0.5


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
        self.stopped = ""  # the stop string that ended it
        self._stream = stream
        self._sink = sink
        self._stop_ids = stop_ids
        self._on_cancel = on_cancel
        self._sampler = SamplerState(request.sampling, sequence.tokens)
        self._row = RowSampling(self._sampler, (), request.logprobs)
        self._matcher = None if request.constraint is None else request.constraint()
        self._allowed: list[Mask] = []  # what the matcher has prepared, a draw each, the last first
        self._over_s = 0.0  # what the matcher took beyond its share
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
        self.usage.guessed_tokens += len(chunk.of.guesses)
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

    @property
    def room(self) -> int:
        """How many guesses it may have."""
        # The last token is drawn after the others, and nothing is drawn after it.
        return self.max_tokens - self.usage.answer_tokens - 1

    def propose(self, most: int, vocab: int) -> list[int]:
        """What must follow or the proposer says may, as far as it can be drawn."""
        most = min(most, self.room)
        if most < 1:
            return []
        found = [] if self._matcher is None else [*islice(self._matcher.forced(most), most)]
        if self.request.proposer is not None and (left := most - len(found)):
            more = self.request.proposer([*self.sequence.tokens, *found], left)
            found += islice(more, left)
        return list(takewhile(range(vocab).__contains__, array("i", found)))

    def prepare(self) -> None:
        """Ask the matcher what may come next, and after the guesses. Any thread may."""
        self._allowed = self._masks(self.sequence.guesses)[::-1]

    def _masks(self, guesses: list[int]) -> list[Mask]:
        """What may come next, and after each guess; []: anything."""
        if self._matcher is None:
            return []
        began_s = time.thread_time() + MASK_S * (1 + len(guesses))
        found = self._matcher.allowed(guesses)
        self._took(time.thread_time() - began_s)
        masks = [np.ascontiguousarray(mask, np.uint32) for mask in found or ()]
        if masks and len(masks) <= len(guesses):
            raise SamplingFailed(f"{len(masks)} masks for {len(guesses)} guesses")
        return masks

    def _took(self, seconds: float) -> None:
        """The matcher took so long beyond its share, while others waited."""
        self._over_s = max(self._over_s + seconds, 0.0)
        if self._over_s > OVER_S:
            raise SamplingFailed("what may come next takes too long to find; simplify the grammar")

    def row(self) -> RowSampling:
        allowed = self._allowed.pop() if self._allowed else None
        early = self.usage.answer_tokens < self.request.sampling.min_tokens
        # Where nothing but the end is allowed, it comes, however early.
        early = early and (allowed is None or _more_than(self._stop_ids, allowed))
        if allowed is None and not early:
            return self._row
        return replace(self._row, banned=[*self._stop_ids] if early else (), allowed=allowed)

    def drafted(self, row: RowSampling | None, vocab: int) -> RowSampling:
        """How a draft of so many ids draws its next guess. row: how it drew the last one."""
        guesses = self.sequence.guesses
        row = row or RowSampling(self._sampler.fork())
        row.state.extend(guesses[-1:])
        allowed = self._masks(guesses)
        early = self.usage.answer_tokens + len(guesses) < self.request.sampling.min_tokens
        mask = allowed[-1][: -(-vocab // 32)] if allowed else None
        return replace(row, banned=[*self._stop_ids] if early else (), allowed=mask)

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
        if self._matcher is not None:
            began_s = time.thread_time()
            self._matcher.accept(token)
            self._took(time.thread_time() - began_s)
        if not stopped:
            self._text += self._stream.push(token)
            finished = self._matcher is not None and self._matcher.finished
            self.stopped = self._stream.stopped
            stopped = bool(self.stopped) or finished
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


def _more_than(ids: frozenset[int], allowed: Mask) -> bool:
    """Whether others than these are allowed."""
    left = allowed.copy()
    for id_ in ids:
        if id_ // 32 < len(left):
            left[id_ // 32] &= ~np.uint32(1 << id_ % 32)
    return bool(left.any())
