"""An executor that remembers which token sits in which slot, and answers with what it can see."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from squall.batch import Batch

VOCAB = 97


def expected(ids: list[int]) -> NDArray[np.float32]:
    """The logits after `ids`: they depend on every token and its place."""
    mixed = 7
    for token in ids:
        mixed = (mixed * 31 + token + 1) % 1_000_003
    return ((np.arange(VOCAB) * 37 + mixed) % 101).astype(np.float32)


class Silent:
    """The text of requests that nobody wants to read."""

    stopped = False

    def __init__(self, _: object) -> None: ...

    def push(self, _: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class FakeExecutor:
    """Keeps tokens instead of keys and values.

    `fail` is raised by the next step. After `hold` the next step waits; `let` lets some go. Logits
    of sequences that begin with `nan` are NaN. logits: those after some ids.
    """

    threads, pool, isa, weight_bytes, kv_bytes, vocab = 1, None, "none", 0, 0, VOCAB
    ids, image_width = VOCAB, 0
    settles = None
    whole = False

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 4,
        context: int = 256,
        max_rows: int = 32,
        max_outputs: int = 16,
        logits: Callable[[list[int]], NDArray[np.float32]] = expected,
    ) -> None:
        self.logits = logits
        self.blocks = blocks
        self.block_size = block_size
        self.context = context
        self.max_rows = max_rows
        self.max_outputs = max_outputs
        self.slots = np.full(blocks * block_size, -1)
        self.rows: list[list[int]] = []
        self.fail: BaseException | None = None
        self.nan = -1
        self._lock = threading.Condition()
        self._allowed = math.inf
        self._held = False

    def hold(self) -> None:
        """Steps wait from now on."""
        self._allowed = 0

    def wait(self) -> int:
        """Wait until a step waits; how many there were before it."""
        with self._lock:
            assert self._lock.wait_for(lambda: self._held, 30)
        return len(self.rows)

    def let(self, steps: float = math.inf) -> None:
        """Let so many steps go."""
        with self._lock:
            self._allowed, self._held = steps, False
            self._lock.notify_all()

    def step(self, batch: Batch) -> NDArray[np.float32]:
        with self._lock:
            if self._allowed <= 0:
                self._held = True
                self._lock.notify_all()
                assert self._lock.wait_for(lambda: self._allowed > 0, 30)
            self._allowed -= 1
        if self.fail is not None:
            raise self.fail
        slots = self._slots(batch)
        self.rows.append(np.diff(batch.bounds).tolist())
        self.slots[slots] = batch.tokens
        logits = np.empty((len(batch.outputs), self.vocab), np.float32)
        for i, row in enumerate(batch.outputs):
            sequence = int(np.searchsorted(batch.bounds, row, side="right")) - 1
            seen = np.arange(batch.positions[row] + 1)
            blocks = batch.block_tables[sequence][seen // self.block_size]
            ids = self.slots[blocks * self.block_size + seen % self.block_size]
            logits[i] = np.nan if ids[0] == self.nan else self.logits(ids.tolist())
        return logits

    def _slots(self, batch: Batch) -> NDArray[np.int32]:
        """Where the rows go, after a look whether the batch is right."""
        assert 0 < len(batch.tokens) <= self.max_rows
        assert len(batch.outputs) <= self.max_outputs
        assert len(batch.tokens) == len(batch.positions) == batch.bounds[-1]
        slots = []
        for s, (start, stop) in enumerate(zip(batch.bounds, batch.bounds[1:], strict=False)):
            positions = batch.positions[start:stop]
            assert np.array_equal(positions, positions[0] + np.arange(stop - start))
            blocks = batch.block_tables[s][positions // self.block_size]
            slots.append(blocks * self.block_size + positions % self.block_size)
        found: NDArray[np.int32] = np.concatenate(slots)
        assert len(set(found.tolist())) == len(found)
        return found
