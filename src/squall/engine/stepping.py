"""Steps: plan, compute, draw, and tell. Whatever goes wrong for one request ends it alone."""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from squall.engine.reply import Reply
from squall.engine.request import FinishReason, Logits
from squall.engine.sampling import Sampled, sample_each
from squall.engine.scheduler import Scheduler
from squall.engine.sequence import Chunk, Sequence, batch_of
from squall.engine.speculation import Speculation
from squall.errors import SamplingFailed
from squall.executors import Executor, ThreadPool


@dataclass(slots=True)
class Counts:
    """What the engine did so far.

    prompt_tokens were computed, some perhaps again; cached_tokens did not have to be. Of
    guessed_tokens, accepted_tokens were right. Seconds in `executor_s` and `sampling_s` are part of
    those in `step_s`.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    errors: int = 0
    steps: int = 0
    step_s: float = 0.0
    executor_s: float = 0.0
    sampling_s: float = 0.0
    longest_step_s: float = 0.0


class Stepper:
    """Owns who is being answered. Everything is done on the engine's thread.

    service_s: how long an answer takes lately. ids: as many there are. speculation: guesses
    for requests that have none of their own.
    """

    def __init__(self, scheduler: Scheduler, ids: int, speculation: Speculation) -> None:
        self.replies: dict[int, Reply] = {}
        self.counts = Counts()
        self.service_s = 1.0
        self._scheduler = scheduler
        self._speculation = speculation
        self._ids = ids
        # Constraints prepare here, beside the steps; the thread begins with the first of them.
        self._beside = ThreadPoolExecutor(1, "squall-prepare")

    def close(self) -> None:
        self._beside.shutdown(wait=False)

    def add(self, reply: Reply) -> None:
        self.replies[reply.sequence.number] = reply
        self._scheduler.add(reply.sequence)

    def end(self, reply: Reply, reason: FinishReason, error: Exception | None = None) -> None:
        """The request leaves; its blocks are free at once."""
        self._scheduler.remove(reply.sequence)
        del self.replies[reply.sequence.number]
        self._speculation.forget(reply.sequence.number)
        self.tell_end(reply, reason, error)
        if reason in ("stop", "length"):
            self.service_s += (reply.usage.running_s - self.service_s) / 8

    def tell_end(self, reply: Reply, reason: FinishReason, error: Exception | None = None) -> None:
        """It is over, whether or not it leaves something here."""
        name = {"cancelled": "cancelled", "error": "errors"}.get(reason, "finished")
        setattr(self.counts, name, getattr(self.counts, name) + 1)
        # Who does not want to hear the end cannot be told of it.
        with suppress(Exception):
            reply.tell(reason, error)

    def step(self, executor: Executor) -> None:
        """Compute a chunk of each running request, and draw tokens for those that are due.

        Raises what `executor.step` does: what is in the KV cache is unknown then.
        """
        started_s = time.perf_counter()
        chunks = self._scheduler.plan(self._guess)
        chunks = [chunk for chunk in chunks if chunk.of.number in self.replies]
        if not chunks:
            return
        # Rows of the same adapters lie together, so that these are read once.
        chunks.sort(key=lambda chunk: hash(chunk.of.request.adapters))
        for chunk in chunks:
            self.counts.cached_tokens += self.replies[chunk.of.number].start(chunk)
            self.counts.guessed_tokens += len(chunk.of.guesses)
        logits = self._compute(executor, chunks)
        due, at = [], 0
        for chunk in chunks:
            # Its first draw is from the row after its last known token.
            first = len(chunk.of.tokens) - 1 - chunk.outputs.start
            if self._advance(chunk, logits[at : at + len(chunk.outputs)]):
                due.append((self.replies[chunk.of.number], at + first))
            at += len(chunk.outputs)
        self._draw(logits, due, executor.pool)
        counts, step_s = self.counts, time.perf_counter() - started_s
        counts.steps += 1
        counts.step_s += step_s
        counts.longest_step_s = max(counts.longest_step_s, step_s)

    def _guess(self, answers: list[Sequence], spare: int) -> None:
        """Set what must follow or its request says may, and then what pays."""
        asking = [one for one in answers if one.request.proposer or one.request.constraint]
        for left, sequence in zip(range(len(asking), 0, -1), asking, strict=True):
            most = self._scheduler.reserve(sequence, spare // left)
            sequence.guesses = self._propose(self.replies[sequence.number], most)
            spare -= len(sequence.guesses)
        found = (self.replies.get(sequence.number) for sequence in answers)
        free = [reply for reply in found if reply and not reply.sequence.guesses]
        self._speculation.guess(free, len(answers), spare, self._scheduler.reserve)

    def _propose(self, reply: Reply, most: int) -> list[int]:
        try:
            return reply.propose(most, self._ids)
        except Exception as error:
            self.end(reply, "error", error)
            return []

    def _compute(self, executor: Executor, chunks: Collection[Chunk]) -> Logits:
        """The logits; while they are computed, constraints prepare what is needed to draw."""
        due = [self.replies[c.of.number] for c in chunks if c.of.request.constraint and c.due]
        batch = batch_of(chunks, self._ids)
        prepared = [
            (reply, self._beside.submit(reply.prepare)) for reply in due if reply.max_tokens
        ]
        called_s = time.perf_counter()
        logits = executor.step(batch)
        executor_s = time.perf_counter() - called_s
        self.counts.executor_s += executor_s
        self._scheduler.pace.observe(len(batch.tokens), executor_s)
        if all(chunk.start == len(chunk.of.tokens) - 1 for chunk in chunks):
            self._speculation.cost.observe(len(batch.tokens), executor_s)
        for reply, preparing in prepared:
            if error := preparing.exception():
                if not isinstance(error, SamplingFailed):
                    error = SamplingFailed(f"the constraint failed: {error!r}")
                self.end(reply, "error", error)
        return logits

    def _advance(self, chunk: Chunk, rows: Logits) -> bool:
        """The chunk was computed, with these logits; whether its request gets a token now."""
        reply = self.replies.get(chunk.of.number)
        if reply is None:
            return False
        try:
            done = self._scheduler.advance(chunk)
            computed = min(chunk.stop, reply.usage.prompt_tokens) - chunk.start
            if computed > 0:
                self.counts.prompt_tokens += computed
                reply.tell_logits(chunk, rows)
        except Exception as error:
            self.end(reply, "error", error)
            return False
        if done and not reply.max_tokens:
            self.end(reply, "length")
            return False
        return done

    def _draw(self, logits: Logits, due: list[tuple[Reply, int]], pool: ThreadPool | None) -> None:
        """Draw from each request's row; where a guess was right, from the next row too, and so on.

        Draws depend on nothing but their row and the tokens before, so answers are the same with
        guesses and without.
        """
        while due:
            rows = [at for _, at in due]
            chosen = logits[rows] if len(rows) < len(logits) else logits
            called_s = time.perf_counter()
            found = sample_each(chosen, [reply.row() for reply, _ in due], pool)
            self.counts.sampling_s += time.perf_counter() - called_s
            due = [
                (reply, at + 1)
                for (reply, at), sampled in zip(due, found, strict=True)
                if self._take(reply, sampled)
            ]

    def _take(self, reply: Reply, sampled: Sampled | Exception) -> bool:
        """Its next token; whether there is a row for another one."""
        try:
            if isinstance(sampled, Exception):
                raise sampled
            hoped = bool(reply.sequence.guesses)
            guessed = self._scheduler.append(reply.sequence, sampled.token)
            if hoped:
                self._speculation.told(reply.sequence.number, right=guessed)
            reason = reply.push(sampled)
            self.counts.answer_tokens += 1
            if guessed:
                reply.usage.accepted_tokens += 1
                self.counts.accepted_tokens += 1
            elif reason is None:
                reply.tell()
        except Exception as error:
            self.end(reply, "error", error)
            return False
        if reason is not None:
            self.end(reply, reason)
            return False
        return guessed
