"""Many texts in one run: rows of one text after those of another, no padding between them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from squall import encoder, executors
from squall.batch import Sequences
from squall.embeddings.tokens import Text
from squall.executors import Executor, Limits, Placement, ThreadPool
from squall.program import Program
from squall.quant import FormatTotal
from squall.recipes.embedders import Pooling, Recipe
from squall.weights import Progress, WeightStore

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Int32 = NDArray[np.int32]
# Rows and texts of a run; a text that is longer has a run of its own.
ROWS, TEXTS = 1024, 256
_BLOCK = 16


def _weighted(rows: Doubles) -> Doubles:
    weights = np.arange(1, len(rows) + 1)[:, None]
    made: Doubles = (rows * weights).sum(0) / weights.sum()
    return made


# Of a text's rows, where all become the vector.
_OF_ALL: Mapping[Pooling, Callable[[Doubles], Doubles]] = {
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.max(0),
    "mean_sqrt_len_tokens": lambda rows: rows.sum(0) / math.sqrt(len(rows)),
    "weightedmean": _weighted,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where networks run, and on whose threads."""

    placement: Placement
    pool: ThreadPool

    def open(
        self, program: Program, store: WeightStore, limits: Limits, progress: Progress | None = None
    ) -> Executor:
        return executors.open(
            program, store, limits, placement=self.placement, pool=self.pool, progress=progress
        )


class Reader:
    """Makes one row of each text. Any thread may call it; runs queue."""

    def __init__(
        self, recipe: Recipe, store: WeightStore, place: Place, pooling: Pooling, context: int
    ) -> None:
        self._spec, self._causal, self._pooling = recipe.spec, recipe.causal, pooling
        self._program = encoder.compile_texts(
            recipe.spec, recipe.text.names, context=context, causal=recipe.causal,
            some=pooling not in _OF_ALL,
        )  # fmt: skip
        self._indices = {index.name for index in self._program.indices}
        self._windows = {name for name in self._indices if name.startswith("spans.")}
        self._store, self._place = store, place
        self._lock = threading.Lock()
        self._executor: Executor | None = None

    @property
    def formats(self) -> tuple[FormatTotal, ...]:
        return () if self._executor is None else self._executor.formats

    def load(self, progress: Progress | None) -> None:
        self._executor = self._opened(ROWS, progress)

    def rows(self, texts: Sequence[Text]) -> Iterator[Floats]:
        """A vector of each text, in order."""
        together = 1 if encoder.reads_one(self._spec) else TEXTS
        for run in runs([len(text.ids) for text in texts], together):
            yield from self._run(texts[run])

    def _opened(self, rows: int, progress: Progress | None = None) -> Executor:
        limits = Limits(
            rows={"tokens": rows, "outputs": TEXTS}, blocks=rows // _BLOCK + TEXTS,
            block_size=_BLOCK, kv_dtype="f32",
        )  # fmt: skip
        return self._place.open(self._program, self._store, limits, progress)

    def _run(self, texts: Sequence[Text]) -> list[Floats]:
        lengths = np.array([len(text.ids) for text in texts], np.int32)
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        inputs, sequences = self._given(texts, lengths, bounds)
        with self._lock:
            executor = self._executor
            if executor is None or executor.max_rows < bounds[-1]:
                executor = self._executor = self._opened(1 << int(bounds[-1] - 1).bit_length())
            alone = not self._program.caches
            given = None if alone else sequences
            (states,) = executor.run(inputs, given, patient=True).values()
        if (pool := _OF_ALL.get(self._pooling)) is None:
            return list(states)
        spans = pairwise(bounds.tolist())
        return [pool(states[a:b].astype(np.float64)).astype(np.float32) for a, b in spans]

    def _given(
        self, texts: Sequence[Text], lengths: Int32, bounds: Int32
    ) -> tuple[dict[str, Int32], Sequences]:
        own = np.arange(bounds[-1], dtype=np.int32) - np.repeat(bounds[:-1], lengths)
        length = np.repeat(lengths, lengths)
        ends = own + 1 if self._causal else length
        first = np.int32(getattr(self._spec, "first", 0))
        given = {
            "tokens": np.concatenate([text.ids for text in texts]), "rotary": own,
            "positions": own + first, "spans": np.stack([np.zeros_like(ends), ends]),
        }  # fmt: skip
        for name in self._windows:
            reach = np.int32(name.partition(".")[2])
            spans = np.maximum(own - reach + 1, 0), np.minimum(own + reach, length)
            given[name] = np.stack(spans)
        if "types" in self._indices:
            seconds = np.array([text.second for text in texts], np.int32)
            most = np.int32(getattr(self._spec, "types", 1) - 1)
            given["types"] = np.minimum(own >= np.repeat(seconds, lengths), most).astype(np.int32)
        if "outputs" in self._indices:
            given["outputs"] = bounds[:-1] if self._pooling == "cls" else bounds[1:] - 1
        blocks = -(-lengths // _BLOCK)
        begins = np.concatenate([[0], np.cumsum(blocks)[:-1]])
        tables = begins[:, None] + np.arange(blocks.max())
        tables = np.minimum(tables, blocks.sum() - 1).astype(np.int32)
        return given, Sequences(positions=own, bounds=bounds, block_tables=tables)


def runs(lengths: Sequence[int], together: int = TEXTS) -> Iterator[slice]:
    """Texts that are read together, in order: as many as there is room for."""
    first = rows = 0
    for at, length in enumerate(lengths):
        if at > first and (rows + length > ROWS or at - first == together):
            yield slice(first, at)
            first, rows = at, 0
        rows += length
    if lengths:
        yield slice(first, len(lengths))
