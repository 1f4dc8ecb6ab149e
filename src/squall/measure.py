"""Rates of a model on this machine, and where the time goes. The tokens are made up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from squall import _native, decoder, executors, quant
from squall.batch import Batch, Int32
from squall.checkpoints import Checkpoint
from squall.engine.memory import choose_context
from squall.errors import InvalidRequest
from squall.executors import CPU, CacheType, Limits, Phase, Placement, thread_pool
from squall.executors.devices import free_bytes
from squall.executors.memory import Sizes, by_memory
from squall.recipes import Recipe
from squall.weights import Progress, WeightStore

MAX_ROWS = 512
MAX_OUTPUTS = 64
BLOCK_SIZE = 16
_SUMMED = ("elapsed_s", "waiting_s", "bytes", "dots", "fmas")


@dataclass(frozen=True, slots=True)
class Workload:
    """What to measure: tokens of the prompt and of the answer, after `depth` tokens of context.

    Each of `batch` sequences has them all; they decode together. A step has at most `rows` tokens
    of a prompt.
    """

    prompt: int
    answer: int
    depth: int = 0
    batch: int = 1
    kv_dtype: CacheType = "f16"
    rows: int = MAX_ROWS

    @property
    def context(self) -> int:
        """Tokens that a sequence has in the end."""
        return self.depth + self.prompt + self.answer

    def test(self, kind: str, tokens: int) -> str:
        """A test's name, such as pp512 or tg128@d4096@b16."""
        depth = f"@d{self.depth}" if self.depth else ""
        return f"{kind}{tokens}{depth}" + (f"@b{self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True, slots=True)
class Result:
    """One test: pp (prompts in as few steps as possible) or tg (a token a sequence and step)."""

    test: str
    tokens_per_second: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.tokens_per_second)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.tokens_per_second) if len(self.tokens_per_second) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the machine does at most, a second, with all threads of an executor."""

    bytes: float
    dots: float
    fmas: float

    @classmethod
    def of(cls, isa: str, threads: int) -> Roofline:
        """Measured now; takes about a second."""
        return cls(_native.read_bandwidth(threads), *_native.peak_rates(isa, threads))

    def limit_s(self, phase: Phase) -> float:
        """The least time for a phase: until its bytes are read, or its products are made."""
        products_s = phase.dots / self.dots + phase.fmas / self.fmas
        return max(phase.bytes / self.bytes, products_s)


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of one test went.

    phases: those of one name together, the longest first; last, what is outside of the program.
    """

    test: str
    steps: int
    elapsed_s: float
    phases: list[Phase]


class Bench:
    """A model that is open to be measured: the executor, with KV cache for a plan."""

    def __init__(
        self,
        prepared: tuple[Checkpoint, Recipe, quant.Plan],
        workload: Workload,
        *,
        threads: int | None = None,
        placement: Placement = CPU,
        weights: Literal["packed", "f32"] = "packed",
        progress: Progress | None = None,
    ) -> None:
        """prepared: what `squall.assembly.prepare` returns."""
        if workload.prompt + workload.answer == 0:
            raise InvalidRequest("-p and -g are both 0; there is nothing to measure")
        checkpoint, recipe, plan = prepared
        batch = workload.batch
        trained = recipe.decoder.context
        compiled = partial(decoder.compile, recipe.decoder, recipe.names)
        store = WeightStore(checkpoint, plan=plan, exact=weights == "f32")
        sizes = Sizes.of(compiled(context=trained), store, workload.kv_dtype, caches=batch)
        loads = sizes.loads(placement.spread(len(sizes.kv)), free_bytes)
        wanted = max(workload.context, 1)
        size = choose_context(wanted, trained=trained, loads=by_memory(loads))
        program = compiled(context=size)
        self.checkpoint = checkpoint
        self.architecture = recipe.architecture
        self.vocab = recipe.decoder.vocab
        blocks = -(-size // BLOCK_SIZE)
        limits = Limits(
            rows={"tokens": max(workload.rows, batch), "outputs": max(MAX_OUTPUTS, batch)},
            blocks=blocks * batch,
            block_size=BLOCK_SIZE,
            kv_dtype=workload.kv_dtype,
        )
        pool = thread_pool(threads)
        self.executor = executors.open(
            program, store, limits, placement=placement, pool=pool, progress=progress
        )
        self._steps = 0
        self.plan(workload)

    def plan(self, workload: Workload) -> None:
        """Measure this from now on; it must fit into the cache that there is."""
        blocks, batch = -(-max(workload.context, 1) // BLOCK_SIZE), workload.batch
        if blocks * batch > self.executor.blocks:
            most = self.executor.blocks * BLOCK_SIZE
            raise InvalidRequest(f"{blocks * batch * BLOCK_SIZE} tokens; the cache has {most}")
        self.workload = workload
        self._tables: Int32 = np.arange(blocks * batch, dtype=np.int32).reshape(-1, blocks)
        self.fill(0, workload.depth)

    def rates(self, repetitions: int, *, warm_up: bool = True) -> list[Result]:
        """Of `repetitions` rounds after one to warm up; a test of no tokens is left out."""
        tests = self._tests()
        rates: dict[str, list[float]] = {name: [] for name, _, _ in tests}
        for _ in range(warm_up + repetitions):
            for name, tokens, run in tests:
                rates[name].append(tokens / seconds(run))
        return [Result(name, found[warm_up:]) for name, found in rates.items()]

    def profiles(self) -> list[Profile]:
        """Where the time of the same tests goes, once."""
        return [self._profile(name, run) for name, _, run in self._tests()]

    def _tests(self) -> list[tuple[str, int, Callable[[], None]]]:
        """Name, tokens of all sequences, and what to run, in this order."""
        load = self.workload
        prompts = partial(self.fill, load.depth, load.depth + load.prompt)
        tests = (("pp", load.prompt, prompts), ("tg", load.answer, self._answers))
        wanted = [test for test in tests if test[1]]
        return [(load.test(kind, n), n * load.batch, run) for kind, n, run in wanted]

    def _answers(self) -> None:
        load = self.workload
        for position in range(load.context - load.answer, load.context):
            self.step(range(load.batch), range(position, position + 1), outputs=True)

    def fill(self, start: int, stop: int) -> None:
        """Compute the positions `start:stop` of each sequence by itself; logits of the last."""
        rows = self.workload.rows
        for sequence in range(self.workload.batch):
            for first in range(start, stop, rows):
                last = min(first + rows, stop)
                one = range(sequence, sequence + 1)
                self.step(one, range(first, last), outputs=last == stop)

    def step(self, sequences: range, positions: range, *, outputs: bool) -> None:
        """One step with the same positions of each sequence, logits of the last if wanted."""
        self._steps += 1
        many, each = len(sequences), len(positions)
        at = np.tile(np.arange(positions.start, positions.stop, dtype=np.int32), many)
        bounds = np.arange(0, many * each + 1, each, dtype=np.int32)
        tables = self._tables[sequences.start : sequences.stop]
        self.executor.step(
            Batch(
                tokens=(at + 1000) % np.int32(self.vocab),
                positions=at,
                bounds=bounds,
                block_tables=tables,
                outputs=bounds[1:] - 1 if outputs else bounds[:0],
            )
        )

    def _profile(self, test: str, run: Callable[[], None]) -> Profile:
        elapsed_s = 0.0

        def timed() -> None:
            nonlocal elapsed_s
            elapsed_s = seconds(run)

        before = self._steps
        phases = _merged(self.executor.profile(timed))
        outside_s = max(0.0, elapsed_s - sum(phase.elapsed_s for phase in phases))
        phases.append(Phase("outside", outside_s, 0.0, 0, 0, 0))
        return Profile(test, self._steps - before, elapsed_s, phases)


def seconds(run: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def _merged(phases: list[Phase]) -> list[Phase]:
    """Phases of one name as one, the longest first."""
    found: dict[str, list[Phase]] = {}
    for phase in phases:
        found.setdefault(phase.name, []).append(phase)
    merged = [
        Phase(name, *(sum(getattr(one, field) for one in same) for field in _SUMMED))
        for name, same in found.items()
    ]
    return sorted(merged, key=lambda phase: -phase.elapsed_s)
