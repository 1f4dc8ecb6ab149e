"""An executor that remembers which token sits in which slot, and answers with what it can see."""

from __future__ import annotations

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


class FakeExecutor:
    """Keeps tokens instead of keys and values."""

    threads, isa, weight_bytes, kv_bytes = 1, "none", 0, 0

    def __init__(self, slots: int) -> None:
        self.slots = np.full(slots, -1)
        self.rows: list[int] = []
        self.fail = False

    def step(self, batch: Batch) -> NDArray[np.float32]:
        if self.fail:
            raise KeyboardInterrupt
        assert len(batch.tokens) == len(batch.positions) == batch.bounds[-1]
        self.rows.append(len(batch.tokens))
        self.slots[batch.slots] = batch.tokens
        stops = [int(batch.positions[row]) + 1 for row in batch.outputs]
        logits = [expected(self.slots[:stop].tolist()) for stop in stops]
        return np.array(logits, np.float32).reshape(len(stops), VOCAB)
