"""One sequence's tokens in the executor's KV cache. A prefix that is there is not computed again.

That is exact, not approximate: a row's result does not depend on how the rows were cut into steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from squall.batch import Batch
from squall.errors import InvalidRequest

# A generation that has not asked for a token for this long gives up its turn to another thread's.
PATIENCE_S = 0.25

Logits = NDArray[np.float32]


class Executor(Protocol):
    """Runs a program on a batch."""

    @property
    def threads(self) -> int: ...

    @property
    def isa(self) -> str: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def kv_bytes(self) -> int: ...

    def step(self, batch: Batch) -> Logits:
        """Logits `[outputs, vocab]` of the rows asked for."""
        ...


class Context:
    """Owns the KV cache of `executor` and knows which tokens are in it.

    `ids` lists are compared by identity first, so extending one in place costs only the new tokens.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        size: int,
        block_size: int = 16,
        max_rows: int = 512,
        max_outputs: int = 64,
    ) -> None:
        self.size = size
        self.max_rows = max_rows
        self.max_outputs = max_outputs
        self._executor: Executor | None = executor
        self._ids: list[int] = []
        self._computed = 0
        self._turn = threading.Condition()
        self._owner: int | None = None
        self._last_used_s = 0.0
        # Block b is page b, so a token's slot is its position.
        self._positions = np.arange(size, dtype=np.int32)
        self._block_table = np.arange(-(-size // block_size), dtype=np.int32)[None]
        self._one_row = np.array([0, 1], np.int32)

    def advance(self, ids: list[int]) -> tuple[Logits, int]:
        """Logits `[vocab]` after the last of `ids`, and how many of them were in the cache."""
        last = len(ids) - 1
        with self._turn:
            start = min(self._take_turn(ids), last)
            whole = (last - start) // self.max_rows * self.max_rows
            self._fill(ids, start, start + whole)
            logits = self._step(ids, range(start + whole, len(ids)), range(last, len(ids)))
        return logits[0], start

    def logit_chunks(
        self, ids: Sequence[int], *, chunk: int, start: int = 0
    ) -> Iterator[tuple[int, Logits]]:
        """Logits of the tokens `start ...` of `ids`, as (first token, `[tokens, vocab]`).

        Steps have `chunk` tokens; a step with more than `max_outputs` logits is run again for the
        rest of them.
        """
        owned = list(ids)
        for first in range(start, len(owned), chunk):
            stop = min(first + chunk, len(owned))
            for at in range(first, stop, self.max_outputs):
                outputs = range(at, min(at + self.max_outputs, stop))
                with self._turn:
                    self._fill(owned, min(self._take_turn(owned), first), first)
                    logits = self._step(owned, range(first, stop), outputs)
                yield at, logits
        self.release(owned)

    @property
    def executor(self) -> Executor:
        """What runs the steps."""
        if self._executor is None:
            raise InvalidRequest("the model is closed; open it again")
        return self._executor

    def close(self) -> None:
        """Give up the executor, and with it weights and cache."""
        with self._turn:
            self._executor = None

    def release(self, ids: list[int]) -> None:
        """The generation of `ids` is over; what it computed stays for the next to reuse."""
        with self._turn:
            if self._ids is ids:
                self._owner = None
                self._turn.notify()

    def clear(self) -> None:
        """Forget every token."""
        with self._turn:
            self._ids, self._computed, self._owner = [], 0, None

    def _take_turn(self, ids: list[int]) -> int:
        """Make the cache that of `ids`; how many of them are in it."""
        me = threading.get_ident()
        while self._ids is not ids and self._owner not in (None, me):
            idle_s = time.monotonic() - self._last_used_s
            if idle_s >= PATIENCE_S:
                break
            self._turn.wait(PATIENCE_S - idle_s)
        self._owner = me
        if self._ids is not ids:
            self._computed = _common_prefix(self._ids[: self._computed], ids)
            self._ids = ids
        return self._computed

    def _fill(self, ids: list[int], start: int, stop: int) -> None:
        """Compute the tokens `start:stop` for the cache alone."""
        for first in range(start, stop, self.max_rows):
            self._step(ids, range(first, min(first + self.max_rows, stop)), range(first, first))

    def _step(self, ids: list[int], rows: range, outputs: range) -> Logits:
        """One step over the tokens at `rows`; logits of those at `outputs`."""
        positions = self._positions[rows.start : rows.stop]
        bounds = self._one_row if len(rows) == 1 else np.array([0, len(rows)], np.int32)
        batch = Batch(
            tokens=np.array(ids[rows.start : rows.stop], np.int32),
            positions=positions,
            slots=positions,
            bounds=bounds,
            block_tables=self._block_table,
            outputs=self._positions[outputs.start - rows.start : outputs.stop - rows.start],
        )
        # If the step is interrupted the cache is only known to hold what came before it.
        self._computed = rows.start
        logits = self.executor.step(batch)
        self._computed = rows.stop
        self._last_used_s = time.monotonic()
        return logits


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])
