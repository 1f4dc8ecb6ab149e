"""A draft model: a small model with the same vocabulary, which guesses what a large one will draw.

It has as many KV blocks as the large one, and a sequence's blocks are the same in both.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np

from squall.engine.sampling import RowSampling, Sampled, sample_each
from squall.engine.scheduler import LEAST_ROWS, Pace
from squall.engine.sequence import Chunk, Sequence, batch_of
from squall.engine.speculation import Cost, Guessing
from squall.executors import Executor, Floats

# A request that gets guesses, how it draws the next one, and how many it may have.
_Drawing = tuple[Guessing, RowSampling, int]


class Draft:
    """Guesses for several requests at a time. vocab: of the large model. cost: of small steps."""

    def __init__(self, executor: Executor, vocab: int) -> None:
        self.executor = executor
        self.cost = Cost()
        self._vocab = min(vocab, executor.vocab)
        self._pace = Pace()
        # Which prefix's end the draft has computed in a block; see `PrefixCache`.
        self._keys: dict[int, bytes] = {}

    def price(self, guessing: Guessing) -> float:
        """Seconds of one guess more, with what has to be computed before it."""
        behind = len(guessing.sequence.tokens) - self._settle(guessing)
        return self.cost.of(min(behind, self.executor.max_rows))

    def guess(self, asked: Collection[tuple[Guessing, int]]) -> None:
        """Set guesses of each request, at most so many; none for those with too much to compute."""
        chunks: list[Chunk] = []
        drawing: list[_Drawing] = []
        written = set[int]()
        # A row for each, and what is left for those with more to compute.
        left = self._pace.rows(self.executor.max_rows, alone=False) - len(asked)
        for guessing, count in asked:
            start = self._settle(guessing)
            known = len(guessing.sequence.tokens)
            stop = min(known, start + 1 + max(left, 0))
            most = min(count, self.executor.context - known)
            blocks = guessing.sequence.blocks[start // self.executor.block_size :]
            # Of those that share a prefix one computes it.
            if most < 1 or not written.isdisjoint(blocks):
                continue
            written.update(blocks)
            left -= stop - start - 1
            row = self._row(guessing, None) if stop == known else None
            wanted = range(stop - (row is not None), stop)
            chunks.append(Chunk(guessing.sequence, start, stop, wanted))
            guessing.computed = stop
            if row is not None:
                drawing.append((guessing, row, most))
        for block in written:
            self._keys.pop(block, None)
        while chunks:
            drawing = self._draw(self._step(chunks), drawing)
            chunks = [_next(guessing.sequence) for guessing, _, _ in drawing]

    def _draw(self, logits: Floats, drawing: Collection[_Drawing]) -> list[_Drawing]:
        """A guess more for each; those that go on."""
        found = sample_each(logits, [row for _, row, _ in drawing], self.executor.pool)
        left = []
        for (guessing, row, most), sampled in zip(drawing, found, strict=True):
            if isinstance(sampled, Sampled):
                guessing.sequence.guesses.append(sampled.token)
                more = len(guessing.sequence.guesses) < most
                if more and (after := self._row(guessing, row)) is not None:
                    guessing.guessed.append(sampled.token)
                    left.append((guessing, after, most))
        return left

    def _row(self, guessing: Guessing, before: RowSampling | None) -> RowSampling | None:
        try:
            return guessing.reply.drafted(before, self._vocab)
        except Exception:
            # The request's own functions raise. They will again for its next token, and it is told.
            return None

    def _settle(self, guessing: Guessing) -> int:
        """How much of a sequence the draft has computed."""
        sequence, size = guessing.sequence, self.executor.block_size
        blocks, keys = sequence.blocks, sequence.keys
        if guessing.blocks is not blocks:
            guessing.blocks, guessing.computed, guessing.stored = blocks, 0, 0
            guessing.guessed.clear()
        following = sequence.tokens[guessing.computed :]
        for guess, token in zip(guessing.guessed, following, strict=False):
            if guess != token:
                break
            guessing.computed += 1
        guessing.guessed.clear()
        # Blocks that are full and right are known by their keys, as others may have computed them.
        while guessing.stored < min(len(keys), len(blocks)):
            block, key = blocks[guessing.stored], keys[guessing.stored]
            if self._keys.get(block) != key:
                if guessing.computed < (guessing.stored + 1) * size:
                    break
                self._keys[block] = key
            guessing.stored += 1
        # The last token is computed again if it has to be: what follows it is asked for.
        found = max(guessing.computed, guessing.stored * size)
        guessing.computed = min(found, len(sequence.tokens) - 1)
        return guessing.computed

    def _step(self, chunks: Collection[Chunk]) -> Floats:
        batch = batch_of(chunks, self.executor.ids, plain=True)
        called_s, rows = time.perf_counter(), len(batch.tokens)
        logits = self.executor.step(batch)
        elapsed_s = time.perf_counter() - called_s
        self._pace.observe(rows, elapsed_s)
        if rows <= len(chunks) * 2 or rows < LEAST_ROWS:
            self.cost.observe(rows, elapsed_s)
        return np.ascontiguousarray(logits[:, : self._vocab])


def _next(of: Sequence) -> Chunk:
    """Its last guess, to be computed."""
    stop = len(of.tokens) + len(of.guesses)
    return Chunk(of, stop - 1, stop, range(stop - 1, stop))
