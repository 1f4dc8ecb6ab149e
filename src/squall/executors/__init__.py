"""What runs programs. `open` chooses by device; everything else knows the `Executor` protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall._native import ThreadPool as ThreadPool
from squall.batch import Batch, Mixture, Sequences
from squall.executors.devices import CPU as CPU
from squall.executors.devices import Placement as Placement
from squall.executors.devices import Stage
from squall.program import Program, Site
from squall.quant import FormatTotal, Plan
from squall.weights import Progress, Term, WeightStore

CacheType = Literal["f16", "f32", "q8_0"]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large runs may be; buffers and caches are laid out once for them.

    rows: of each row space; of those that are not named as of tokens.
    blocks, block_size: the paged KV cache; block_size a multiple of 16.
    """

    rows: Mapping[str, int] = field(default_factory=lambda: {"tokens": 512, "outputs": 64})
    blocks: int = 1
    block_size: int = 16
    kv_dtype: CacheType = "f16"


@dataclass(frozen=True, slots=True)
class Phase:
    """Where time went: a part of an op, in all steps of a profile.

    elapsed_s, waiting_s: time, and how much of it threads waited for others and for work.
    bytes: of weights and KV cache that must be read. dots, fmas: multiply-accumulates of int8 and
        of float32.
    """

    name: str
    elapsed_s: float
    waiting_s: float
    bytes: int
    dots: int
    fmas: int


class Adapter(Protocol):
    """An adapter as an executor has it, for `Batch.mixtures`; freed with its last owner."""

    @property
    def nbytes(self) -> int: ...


class Memory(Protocol):
    """What a sequence recalls, for `Sequences.memories`; freed with its last owner."""

    @property
    def rows(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def write(self, first: int, keys: Sequence[Floats], values: Sequence[Floats]) -> None:
        """Keep keys and values from row `first` on; not while a run recalls them.

        keys, values: for each of the program's memories, [rows, kv_heads * head_dim].
        """
        ...


class Executor(Protocol):
    """Runs a program: one call a step.

    pool: its threads, which others may share between runs. max_rows: tokens of a step.
    vocab: how wide the logits are. ids: how many tokens can be embedded. image_width: how wide the
        rows of images are; 0: it takes none.
    plan, formats: what the weights became.
    placement: where it runs.
    whole: what a prompt's rows are depends on all of them, so that they have to be one step.
    settles: from so many tokens of an answer on, K and V depend on where the prompt ended.
    """

    program: Program
    context: int
    vocab: int
    ids: int
    image_width: int
    blocks: int
    block_size: int
    max_rows: int
    max_outputs: int
    threads: int
    isa: str
    plan: Plan
    formats: tuple[FormatTotal, ...]
    weight_bytes: int
    kv_bytes: int
    settles: int | None
    whole: bool
    placement: Placement

    @property
    def pool(self) -> ThreadPool | None: ...

    def run(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        sequences: Sequences | None = None,
        mixtures: Sequence[Mixture] = (),
        *,
        patient: bool = False,
    ) -> dict[str, Floats]:
        """The program's outputs, by name, [rows, width].

        inputs: its indices (int32) and inputs (float32), by name. sequences: of cached attention;
            K and V are in the caches afterwards. mixtures: of adapters, which rows name.
        patient: in slices, between which other runs on the pool go first; the bytes are the same.
        """
        ...

    def adapter(self, terms: Mapping[Site, Term]) -> Adapter:
        """An adapter for runs of this program; may be made while one runs.

        Raises InvalidRequest for a site that the program has not, or that has another shape.
        """
        ...

    def memory(self, rows: int) -> Memory:
        """Room for what a sequence recalls; zeros at first. May be made while a run is on."""
        ...

    def step(self, batch: Batch) -> Floats:
        """A run of a decoder: logits [outputs, vocab]."""
        ...

    def requantize(self, plan: Plan, *, progress: Progress | None = None) -> None:
        """Load all weights again from the checkpoint, by another plan; the caches are lost.

        Until it is done the old weights are in memory too; if it fails, they stay.
        """
        ...

    def profile(self, act: Callable[[], None]) -> list[Phase]:
        """Where the time of the runs in `act` goes, in the order of the program."""
        ...

    def value(self, name: str) -> Floats:
        """A kept value of the last run, float32 [rows, width]."""
        ...


def open(  # noqa: PLR0913
    program: Program,
    store: WeightStore,
    limits: Limits,
    *,
    placement: Placement = CPU,
    pool: ThreadPool | None = None,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> Executor:
    """An executor of the program, with the weights of the store.

    placement: the devices that it runs on.
    pool: threads to share with others; by default those of `thread_pool()`.
    keep: names of values that `value` can return after a run.
    progress: called with (bytes of the checkpoint loaded, bytes in all).
    """
    given: dict[str, Any] = {"pool": pool, "keep": keep, "progress": progress}
    if placement.ranks is not None:
        from squall.executors.parallel import open_rank

        return open_rank(program, store, limits, placement=placement, **given)
    (device, _), *more = placement.spread(len(program.layers))
    if more:
        from squall.executors.staged import StagedExecutor

        return StagedExecutor(program, store, limits, placement=placement, **given)
    if device == "cpu":
        from squall.executors.native import NativeExecutor

        return NativeExecutor(program, store, limits, **given)
    from squall.gpu.executor import TorchExecutor

    one = replace(placement, stages=(Stage(device),))
    return TorchExecutor(program, store, limits, placement=one, **given)


def default_threads() -> int:
    """As many threads as this process may use."""
    return _native.default_threads()[0]


def thread_pool(threads: int | None = None) -> ThreadPool:
    """So many threads, the caller's among them; by default as many as this process may use."""
    return ThreadPool(threads or default_threads())
