"""What runs programs. `open` chooses by device; everything else knows `Executor`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall._native import ThreadPool as ThreadPool
from squall.batch import Batch, Int32, Mixture, Sequences
from squall.errors import InvalidRequest
from squall.executors.devices import CPU as CPU
from squall.executors.devices import Placement as Placement
from squall.executors.devices import Stage
from squall.program import Embed, Program, Site
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


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What an executor is to be; see `open`."""

    program: Program
    store: WeightStore
    limits: Limits
    placement: Placement
    pool: ThreadPool
    keep: frozenset[str]


class Executor(ABC):
    """Runs a program: one call a step.

    pool: its threads, which others may share between runs. max_rows: tokens of a step.
    vocab: how wide the logits are. ids: how many tokens can be embedded. image_width: how wide the
        rows of images are; 0: it takes none.
    plan, formats: what the weights became.
    placement: where it runs.
    whole: what a prompt's rows are depends on all of them, so that they have to be one step.
    settles: from so many tokens of an answer on, K and V depend on where the prompt ended.
    """

    isa: str
    formats: tuple[FormatTotal, ...]
    kv_bytes: int
    settles: int | None = None

    def __init__(self, order: Order) -> None:
        program, limits = order.program, order.limits
        self.program, self.placement, self.pool = program, order.placement, order.pool
        self.context, self.threads = program.context, order.pool.threads
        self.vocab = next((out.width for out in program.outputs if out.name == "logits"), 0)
        embeds = (op for op in program.ops if isinstance(op, Embed))
        self.ids = next((op.table.rows for op in embeds if op.index.name == "tokens"), 0)
        self.image_width = next((v.width for v in program.inputs if v.name == "images"), 0)
        self.blocks, self.block_size = limits.blocks, limits.block_size
        self.max_rows = limits.rows.get("tokens", 0)
        self.max_outputs = limits.rows.get("outputs", 0)
        self._indices, self._spaces = program.indices, program.spaces
        self.whole = any(index.name == "shared" for index in self._indices)
        self._limits, self._kept = limits, order.keep
        if missing := self._kept - {value.name for value in program.values}:
            raise InvalidRequest(f"the program has no value named {', '.join(sorted(missing))}")

    @property
    def plan(self) -> Plan:
        return self._store.plan

    @property
    def weight_bytes(self) -> int:
        return sum(total.nbytes for total in self.formats)

    def load(self, store: WeightStore, progress: Progress | None = None) -> None:
        """Take all weights from a store, in place of those it has; not during a run."""
        self._load(store, progress)
        self._store = store

    @abstractmethod
    def _load(self, store: WeightStore, progress: Progress | None) -> None: ...

    @abstractmethod
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

    @abstractmethod
    def adapter(self, terms: Mapping[Site, Term]) -> Adapter:
        """An adapter for runs of this program; may be made while one runs.

        Raises InvalidRequest for a site that the program has not, or that has another shape.
        """

    @abstractmethod
    def memory(self, rows: int) -> Memory:
        """Room for what a sequence recalls; zeros at first. May be made while a run is on."""

    def step(self, batch: Batch) -> Floats:
        """A run of a decoder: logits [outputs, vocab]."""
        given = batch.inputs(self._indices, self.program.inputs)
        return self.run(given, batch, batch.mixtures)["logits"]

    def requantize(self, plan: Plan, *, progress: Progress | None = None) -> None:
        """Load all weights again from the checkpoint, by another plan; the caches are lost.

        Until it is done the old weights are in memory too; if it fails, they stay.
        """
        self.load(self._store.replanned(plan), progress)

    @abstractmethod
    def profile(self, act: Callable[[], None]) -> list[Phase]:
        """Where the time of the runs in `act` goes, in the order of the program."""

    @abstractmethod
    def value(self, name: str) -> Floats:
        """A kept value of the last run, float32 [rows, width]."""

    def _given(
        self, inputs: Mapping[str, NDArray[np.generic]]
    ) -> tuple[dict[str, int], dict[str, Int32], dict[str, Floats]]:
        """Rows of each space, and the indices and values that the program asks for."""
        values = self.program.inputs
        names = [*(index.name for index in self._indices), *(value.name for value in values)]
        try:
            found = {name: inputs[name] for name in names}
        except KeyError as error:
            raise InvalidRequest(f"the run lacks {error}, which the program asks for") from None
        rows = {value.rows: len(found[value.name]) for value in values}
        rows |= {index.rows: found[index.name].shape[-1] for index in self._indices}
        indices = {index.name: cast(Int32, found[index.name]) for index in self._indices}
        return rows, indices, {value.name: cast(Floats, found[value.name]) for value in values}


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
    order = Order(program, store, limits, placement, pool or thread_pool(), frozenset(keep))
    if placement.ranks is not None:
        from squall.executors.parallel import open_rank

        return open_rank(order, progress)
    kind, *more = (device for device, _ in placement.spread(len(program.layers)))
    if not more:
        order = replace(order, placement=replace(placement, stages=(Stage(kind),)))
    executor: Executor = resolve_name(_KINDS.get("" if more else kind, _TORCH))(order)
    executor.load(store, progress)
    return executor


# By the only device; "": there are several. Named, as PyTorch is slow to import.
_KINDS = {
    "": "squall.executors.staged:StagedExecutor",
    "cpu": "squall.executors.native:NativeExecutor",
}
_TORCH = "squall.gpu.executor:TorchExecutor"


def default_threads() -> int:
    """As many threads as this process may use."""
    return _native.default_threads()[0]


def thread_pool(threads: int | None = None) -> ThreadPool:
    """So many threads, the caller's among them; by default as many as this process may use."""
    return ThreadPool(threads or default_threads())
