"""What the engine needs of an executor."""

from __future__ import annotations

from typing import Protocol

from squall._native import ThreadPool
from squall.batch import Batch
from squall.engine.request import Logits


class Executor(Protocol):
    """Runs a program on a batch."""

    threads: int
    isa: str
    weight_bytes: int
    kv_bytes: int
    context: int
    vocab: int
    blocks: int
    block_size: int
    max_rows: int
    max_outputs: int

    @property
    def pool(self) -> ThreadPool | None: ...

    def step(self, batch: Batch) -> Logits:
        """Logits `[outputs, vocab]` of the rows asked for."""
        ...
