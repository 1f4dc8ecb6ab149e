"""What the next step computes. There is no prefill and no decode: tokens are known or computed.

A sequence that runs has KV blocks for all its known tokens. Those with one pending token go first,
a row each; then prompts get what the pace of the others allows; guesses get what is left. Ints
only.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from squall.engine.prefix_cache import PrefixCache
from squall.engine.sequence import Chunk, Sequence

SHARED_S = 0.08
ALONE_S = 0.5
FIRST_ROWS = 64
LEAST_ROWS = 16
MOST_ROWS = 2**31
_NUMBER = attrgetter("number")

# (sequences that get a row each, rows left) -> sets guesses of some, at most so many together and
# where `Scheduler.reserve` gave room; it may remove sequences.
Guess = Callable[[list[Sequence], int], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one step: requests, rows, rows whose logits are told, and rows of prompts.

    recompute: nothing stays in the KV cache between tokens.
    """

    requests: int
    rows: int
    outputs: int
    prompt_rows: int = MOST_ROWS
    recompute: bool = False


class Pace:
    """How many rows of prompts a step may have, so that running answers keep theirs.

    A step lasts about `SHARED_S` if an answer waits for its next token, and otherwise about
    `ALONE_S`, so that who comes or leaves is noticed soon.
    """

    def __init__(self) -> None:
        self._row_s: float | None = None

    def rows(self, limit: int, *, alone: bool) -> int:
        """At least `LEAST_ROWS`, at most `limit`."""
        if self._row_s is None:
            return limit if alone else min(limit, FIRST_ROWS)
        rows = int((ALONE_S if alone else SHARED_S) / self._row_s)
        return min(limit, max(rows, LEAST_ROWS))

    def observe(self, rows: int, seconds: float) -> None:
        if rows >= LEAST_ROWS:
            row_s = max(seconds, 1e-9) / rows
            self._row_s = row_s if self._row_s is None else (self._row_s + row_s) / 2


class Scheduler:
    """Owns what waits and what runs, both in order of arrival, and their blocks.

    First come, first served: nothing overtakes a sequence that waits for blocks, and when a running
    answer needs one and there is none, the youngest gives up its own and is computed again later.
    """

    def __init__(self, cache: PrefixCache, limits: Limits) -> None:
        self.cache = cache
        self.limits = limits
        self.pace = Pace()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.waiting_tokens = 0
        self.preemptions = 0
        # Who is about to compute the block of a key; whoever wants it too waits for it.
        self._promised: dict[bytes, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """A new or preempted request waits for its turn."""
        insort(self.waiting, sequence, key=_NUMBER)
        self.waiting_tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        """The request is over; its blocks are free at once."""
        if sequence.blocks:
            self.running.remove(sequence)
            self._give_up_blocks(sequence)
        else:
            self._unqueue(sequence)

    def plan(self, guess: Guess = lambda *_: None) -> list[Chunk]:
        """The chunks of the next step; empty only if nothing runs or waits."""
        self._grow()
        self._admit()
        answers = [sequence for sequence in self.running if sequence.pending == 1]
        prompts = self._plan_prompts(len(answers))
        rows_left = self.limits.rows - sum(chunk.stop - chunk.start for chunk in prompts)
        outputs_left = self.limits.outputs - sum(len(chunk.outputs) for chunk in prompts)
        spare = 0 if self.limits.recompute else min(rows_left, outputs_left) - len(answers)
        if spare > 0 and answers:
            guess(answers, spare)
        chunks = []
        for sequence in answers:
            self._fit(sequence)
            rows = range(sequence.computed, len(sequence.tokens) + len(sequence.guesses))
            chunks.append(Chunk(sequence, rows.start, rows.stop, rows))
        return chunks + prompts

    def advance(self, chunk: Chunk) -> bool:
        """The chunk was computed; whether all known tokens now are, so that one can be drawn."""
        sequence, known = chunk.of, len(chunk.of.tokens)
        if chunk.outputs:
            sequence.scored = min(chunk.outputs.stop, known)
            if chunk.outputs.stop < chunk.stop:
                return False  # the same rows again, for the logits of the rest of them
        self._set_computed(sequence, min(chunk.stop, known))
        done = sequence.pending == 0
        if done and self.limits.recompute:
            sequence.computed = 0
        return done

    def append(self, sequence: Sequence, token: int) -> bool:
        """`token` was drawn; whether it was guessed and so is computed: the next can be drawn."""
        sequence.tokens.append(token)
        if not sequence.guesses:
            return False
        if sequence.guesses.pop(0) == token:
            sequence.scored = len(sequence.tokens)
            self._set_computed(sequence, len(sequence.tokens))
            return True
        # What wrong guesses left in the cache is overwritten.
        sequence.guesses.clear()
        self._fit(sequence)
        return False

    def reserve(self, sequence: Sequence, most: int) -> int:
        """Blocks for its next guesses, for as many as there is room that nobody else needs."""
        known, room = len(sequence.tokens), self.cache.pool.available + len(sequence.blocks)
        most = max(min(most, room * self.cache.block_size - known), 0)
        if most:
            self._take(sequence, self._needed(known + most))
        return most

    def restart(self) -> None:
        """Forget all that was computed: running requests begin again, and no prefix is known."""
        for sequence in tuple(self.running):
            self._preempt(sequence)
        self.cache.clear()

    def _plan_prompts(self, answers: int) -> list[Chunk]:
        """Chunks of those that have more to compute, beside so many that get one row each."""
        limits, chunks = self.limits, []
        more = [sequence for sequence in self.running if sequence.pending > 1]
        # Every running sequence may have one output; the rest is for those that want several.
        outputs = limits.outputs - len(self.running)
        rows = self.pace.rows(min(limits.rows, limits.prompt_rows), alone=not answers)
        free = limits.rows - answers
        for sequence in more:
            # The oldest gets half, so that it is done soon; the next gets half of the rest.
            share = min(rows, rows if sequence is more[-1] else max(rows // 2, LEAST_ROWS), free)
            if sequence.request.whole and not sequence.computed:
                share = sequence.prompt if sequence.prompt <= free else 0
            chunk = self._chunk(sequence, share, free, outputs) if share else None
            if chunk is not None:
                chunks.append(chunk)
                rows = max(rows - (chunk.stop - chunk.start), 0)
                free -= chunk.stop - chunk.start
                outputs -= max(len(chunk.outputs) - 1, 0)
        return chunks

    def _chunk(self, sequence: Sequence, rows: int, most: int, outputs: int) -> Chunk | None:
        """A chunk of about `rows`, with at most `outputs` beside the sequence's own one.

        most: rows that there are, for an image of which all have to be in one step.
        """
        start, whole = sequence.computed, sequence.request.whole and not sequence.computed
        chunk = rows if whole else sequence.request.chunk
        stop = min(start + rows, len(sequence.tokens), start + (chunk or rows))
        stop = _uncut(sequence, start, stop, most)
        if start == stop:
            return None
        first = max(start, sequence.scored)
        if first >= stop:
            return Chunk(sequence, start, stop, range(stop, stop))
        wanted = range(first, min(stop, first + outputs + 1))
        return Chunk(sequence, start, stop if chunk else wanted.stop, wanted)

    def _grow(self) -> None:
        """Give running sequences room for the token they got; the youngest may have to leave."""
        size = self.cache.block_size
        for sequence in tuple(self.running):
            while sequence.blocks and len(sequence.blocks) * size < len(sequence.tokens):
                if self.cache.pool.available:
                    self._take(sequence, len(sequence.blocks) + 1)
                else:
                    self._preempt(self.running[-1])

    def _fit(self, sequence: Sequence) -> None:
        """Give back blocks that no token or guess needs."""
        needed = self._needed(len(sequence.tokens) + len(sequence.guesses))
        while len(sequence.blocks) > needed:
            self.cache.pool.release(sequence.blocks.pop(), keep=False)

    def _needed(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def _take(self, sequence: Sequence, blocks: int) -> None:
        """More blocks, until it has so many."""
        sequence.blocks.extend(self.cache.pool.take() for _ in range(blocks - len(sequence.blocks)))

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        self.add(sequence)
        self.preemptions += 1

    def _admit(self) -> None:
        """Let waiting requests run, in order, as far as there are blocks."""
        if not self.waiting:
            return
        for sequence in self.waiting[: self.limits.requests]:
            if len(self.running) == self.limits.requests:
                return
            self.cache.extend(sequence)
            # At least the token is computed whose logits are the first that are wanted.
            useful = sequence.keys[: sequence.scored // self.cache.block_size]
            found = self.cache.find(useful)
            if len(found) < len(useful) and useful[len(found)] in self._promised:
                continue
            if not self._take_blocks(sequence, found):
                return
            self._unqueue(sequence)
            insort(self.running, sequence, key=_NUMBER)

    def _take_blocks(self, sequence: Sequence, found: list[int]) -> bool:
        """Blocks for all tokens, `found` among them, if that leaves each running request one."""
        pool = self.cache.pool
        for block in found:
            pool.share(block)
        needed = self._needed(len(sequence.tokens))
        if pool.available < needed - len(found) + len(self.running):
            self.cache.release(found)
            return False
        sequence.blocks = array("i", found)
        self._take(sequence, needed)
        sequence.stored = len(found)
        sequence.computed = len(found) * self.cache.block_size
        for key in sequence.keys[len(found) :]:
            self._promised.setdefault(key, sequence)
        return True

    def _set_computed(self, sequence: Sequence, computed: int) -> None:
        """So many tokens are in the cache; others may use the blocks that they fill."""
        sequence.computed = computed
        full = computed // self.cache.block_size
        if full > sequence.stored:
            self.cache.extend(sequence)
            done = slice(sequence.stored, full)
            for key, block in zip(sequence.keys[done], sequence.blocks[done], strict=False):
                self.cache.store(key, block)
                self._keep_promise(key, sequence)
            sequence.stored = full

    def _give_up_blocks(self, sequence: Sequence) -> None:
        self.cache.release(sequence.blocks)
        for key in sequence.keys[sequence.stored :]:
            self._keep_promise(key, sequence)
        sequence.blocks = array("i")
        sequence.guesses = []
        sequence.stored = sequence.computed = 0

    def _keep_promise(self, key: bytes, sequence: Sequence) -> None:
        if self._promised.get(key) is sequence:
            del self._promised[key]

    def _unqueue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.waiting_tokens -= len(sequence.tokens)


def _uncut(sequence: Sequence, start: int, stop: int, most: int) -> int:
    """Where tokens from `start` to about `stop` may end: images may have to be in one step."""
    for span in sequence.spans:
        if span.mutual and span.start < stop < span.stop:
            if span.start > start:
                return span.start
            return span.stop if span.stop - start <= most else start
    return stop
