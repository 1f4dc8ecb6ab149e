"""The executor of PyTorch's devices: one op of the program after another, or a CUDA graph."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squall import program as p
from squall.batch import Mixture, Sequences
from squall.errors import OutOfMemory
from squall.executors import Adapter, Floats, Limits, Memory, Phase, Placement, ThreadPool
from squall.executors.base import NO_SEQUENCES, ProgramReader, layout_of, sites_of
from squall.gpu import attention, graphs, ops
from squall.gpu.adapters import TorchAdapter, TorchMixture
from squall.gpu.inputs import Given, Inputs, expect, staged, views
from squall.gpu.matrices import Matrices
from squall.gpu.profile import Profile
from squall.quant import Plan
from squall.weights import Progress, Term, WeightStore


class TorchMemory:
    """See `executors.Memory`. at: keys and values of each of the program's memories."""

    def __init__(
        self, layers: Sequence[p.CacheLayer], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers, self.rows, self.dtype = tuple(layers), rows, dtype
        shapes = [(rows, layer.kv_heads * layer.head_dim) for layer in layers]
        empty = functools.partial(torch.zeros, dtype=dtype, device=device)
        self.at = [(empty(shape), empty(shape)) for shape in shapes]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for pair in self.at for part in pair)

    def fits(self, program: p.Program, dtype: torch.dtype) -> bool:
        """Whether runs of a program can recall it."""
        return (self.layers, self.dtype) == (program.memories, dtype)

    def write(self, first: int, keys: Sequence[Floats], values: Sequence[Floats]) -> None:
        """See `executors.Memory`."""
        count = len(keys[0]) if keys else 0
        expect(
            len(keys) == len(values) == len(self.at) and 0 <= first <= self.rows - count,
            "keys and values are of each memory, and of rows that it has",
        )
        for pair, *given in zip(self.at, keys, values, strict=True):
            for own, new in zip(pair, given, strict=True):
                fits = new.shape == (count, own.shape[1])
                expect(fits, "keys and values must be [rows, kv_heads * head_dim]")
                own[first : first + count] = torch.from_numpy(np.ascontiguousarray(new))


class TorchExecutor(ProgramReader):
    """Runs a program on one device; see `Executor`, and `executors.open` for the arguments.

    Runs are one at a time, whether they are patient or not.
    """

    def __init__(  # noqa: PLR0913
        self,
        program: p.Program,
        store: WeightStore,
        limits: Limits,
        *,
        placement: Placement,
        pool: ThreadPool | None = None,
        keep: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        super().__init__(program, limits, pool, keep)
        self.placement = placement
        name = placement.stages[0].device
        self._device = torch.device("cpu" if name == "torch" else name)
        self._dtype = activations(self._device, placement, store)
        self._kv_dtype = cache_type(limits, self._dtype)
        self.isa = f"{name} {described(self._device)} ({_SHORT[self._dtype]})"
        self._lock = threading.Lock()
        self._inputs = Inputs(program, limits)
        kept = (value for value in program.values if value.name in self._kept)
        self._held = tuple(dict.fromkeys((*program.outputs, *kept)))
        self._last: tuple[graphs.Outputs, Mapping[str, int]] = ({}, {})
        self._profile: Profile | None = None
        with memory_errors("the KV cache"), self._on_device():
            self._caches = [
                attention.Cache(self.blocks, self.block_size, layer, self._kv_dtype, self._device)
                for layer in program.caches
            ]
        self.kv_bytes = sum(cache.nbytes for cache in self._caches)
        self._load(store, progress)

    def requantize(self, plan: Plan, *, progress: Progress | None = None) -> None:
        """See `Executor`. Not during a run."""
        self._load(self._store.replanned(plan), progress)

    def _load(self, store: WeightStore, progress: Progress | None) -> None:
        program = store.arranged(self.program)
        weights = Matrices.of(store, self._device, self._dtype)
        with memory_errors("the weights"), self._on_device():
            weights.load(program.weights(), self.pool, progress)
            wide = ops.wide_values(program)
            lowering = ops.Lowering(
                weights, self._caches, self._device, self._dtype, self.placement.exact, wide
            )
            acts = [ops.lower(op, lowering) for op in program.ops]
        self._types = {value: lowering.type_of(value) for value in program.inputs}
        self._steps = list(zip(program.ops, acts, self._dying(program), strict=True))
        self._sites = sites_of(program)
        self._layout = layout_of(self._sites)
        cuda = self._device.type == "cuda"
        self._graphs = graphs.Graphs(graphs.CudaRecorder(self._device)) if cuda else None
        self._store, self._weights = store, weights
        self.plan = store.plan
        self.formats = weights.totals(program.weights())
        self.weight_bytes = sum(total.nbytes for total in self.formats)

    def _dying(self, program: p.Program) -> list[list[int]]:
        """The values that nothing reads after an op, for each op."""
        needed = {value.id for value in self._held}
        found: list[list[int]] = []
        for op in reversed(program.ops):
            dying = {value.id for value in (*p.reads(op), op.out)} - needed
            found.append(sorted(dying))
            needed |= dying
        return found[::-1]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """What is done is done on the executor's device, or with its threads."""
        if self._device.type == "cpu" and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        cuda = self._device.type == "cuda"
        with torch.cuda.device(self._device) if cuda else nullcontext():
            yield

    def adapter(self, terms: Mapping[p.Site, Term]) -> Adapter:
        """See `Executor`."""
        with memory_errors("an adapter"), self._on_device():
            return TorchAdapter.of(self._sites, terms, self._device)

    def memory(self, rows: int) -> Memory:
        """See `Executor`."""
        layers = self.program.memories
        expect(layers, "the program has no memories")
        expect(0 < rows < 2**31, "a memory has 1 to 2^31 - 1 rows")
        with memory_errors(f"{rows} rows of an image"), self._on_device():
            return TorchMemory(layers, rows, self._kv_dtype, self._device)

    def run(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        sequences: Sequences | None = None,
        mixtures: Sequence[Mixture] = (),
        *,
        patient: bool = False,  # noqa: ARG002  # runs on one device are one after another
    ) -> dict[str, Floats]:
        """See `Executor`. Raises InvalidRequest for what is missing, misshapen or out of range."""
        rows, indices, values = self._given(inputs)
        given = Given(
            rows,
            {index.name: found for index, found in zip(self._indices, indices, strict=True)},
            {v.name: found for v, found in zip(self.program.inputs, values, strict=True)},
        )
        at = sequences or NO_SEQUENCES
        given = self._inputs.checked(given, at, len(mixtures))
        made_here = self._made_here(at, mixtures)
        with self._lock, memory_errors("the buffers of a step"), self._on_device():
            outputs = self._outputs(given, at, *made_here)
            self._last = outputs, rows
            found = self._fetched(
                {v.name: outputs[v.name][: rows[v.rows]] for v in self.program.outputs}
            )
            if self._profile is not None:
                self._profile.end()
        return found

    def _made_here(
        self, at: Sequences, mixtures: Sequence[Mixture]
    ) -> tuple[list[TorchMixture], list[TorchMemory | None]]:
        """Mixtures and memories, if they fit."""
        adapted: list[TorchMixture] = []
        for mixture in mixtures:
            fitting = [
                (adapter, weight) for adapter, weight in mixture
                if isinstance(adapter, TorchAdapter) and adapter.layout == self._layout
            ]  # fmt: skip
            expect(len(fitting) == len(mixture), "an adapter was made for another model")
            adapted.append(fitting)
        recalled: list[TorchMemory | None] = []
        for memory in at.memories:
            if memory is None:
                recalled.append(None)
            elif isinstance(memory, TorchMemory) and memory.fits(self.program, self._kv_dtype):
                recalled.append(memory)
        expect(len(recalled) == len(at.memories), "a memory was made for another model")
        return adapted, recalled

    def _outputs(
        self, given: Given, at: Sequences, mixtures: list[TorchMixture],
        memories: list[TorchMemory | None],
    ) -> graphs.Outputs:  # fmt: skip
        """Outputs and kept values on the device; there may be more rows than are wanted."""
        segments, groups = self._inputs.segments(given), self._inputs.groups(given)
        special = any([*segments.values(), *groups.values(), *memories])
        few = None if special else self._few(given.rows)
        given = given if few is None else self._inputs.padded(given, few)
        arrays: dict[str, NDArray[np.generic]] = {**given.indices, **given.values}
        for name, found in groups.items():
            arrays |= {f"{name}.{i}": group for i, group in enumerate(found)}
        shape, placed = None, {}
        if self._inputs.cached:
            rows = None if few is None else few["tokens"]
            placed, shape = attention.layout(at, self.block_size, rows=rows)
            arrays |= {f"at.{name}": array for name, array in placed.items()}
        buffer, places = staged(arrays, pinned=self._device.type == "cuda")

        def body(inputs: Tensor) -> graphs.Outputs:
            tensors = views(inputs, places)
            values = {v.id: tensors[v.name].to(self._types[v]) for v in self.program.inputs}
            run = ops.Run(values, tensors, None, memories, mixtures, segments)
            run.groups = {
                name: [tensors[f"{name}.{i}"] for i in range(len(found))]
                for name, found in groups.items()
            }
            if shape is not None:
                own = {name: tensors[f"at.{name}"] for name in placed}
                run.rows = attention.Rows(own, shape, self.block_size)
            return self._acted(run)

        if self._profile is not None:
            self._profile.begin(given, at)
        if few is None or self._graphs is None:
            return body(buffer.to(self._device, non_blocking=True))
        return self._graphs.run((places, shape), buffer, self._device, body)

    def _few(self, rows: Mapping[str, int]) -> Mapping[str, int] | None:
        """Rows of each space for a graph; None: it is none for that."""
        if self._graphs is None or self._profile is not None or not self._inputs.cached:
            return None
        most = {"tokens": graphs.MOST_ROWS, "outputs": graphs.MOST_ROWS}
        if any(count > most.get(space, 0) for space, count in rows.items()):
            return None
        return {space: graphs.padded_rows(count) for space, count in rows.items()}

    def _acted(self, run: ops.Run) -> graphs.Outputs:
        for number, (op, act, dying) in enumerate(self._steps):
            if self._profile is None:
                out = act(run)
            else:
                out = self._profile.act(number, op, functools.partial(act, run))
            run.values[op.out.id] = out
            for value in dying:
                del run.values[value]
        return {value.name: run[value] for value in self._held}

    def _fetched(self, found: graphs.Outputs) -> dict[str, Floats]:
        """On the host, as float32: the one time that it waits for the device."""
        if self._device.type != "cuda":
            return {
                name: value.to("cpu", torch.float32, copy=True).numpy()
                for name, value in found.items()
            }
        host = {
            name: torch.empty(value.shape, pin_memory=True).copy_(value.float(), non_blocking=True)
            for name, value in found.items()
        }
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        return {name: value.numpy() for name, value in host.items()}

    def profile(self, act: Callable[[], None]) -> list[Phase]:
        """See `Executor`. What is waited for is not known; steps are not CUDA graphs meanwhile."""
        with self._lock:
            self._profile = profile = Profile(self._weights, self._device, self._kv_dtype.itemsize)
        try:
            act()
        finally:
            with self._lock:
                self._profile = None
        return profile.phases()

    def value(self, name: str) -> Floats:
        """See `Executor`."""
        with self._lock, self._on_device():
            outputs, rows = self._last
            expect(
                name in self._kept and name in outputs, "only a kept value can be read after a step"
            )
            space = next(value.rows for value in self._held if value.name == name)
            return self._fetched({name: outputs[name][: rows[space]]})[name]


_SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_DTYPES = {name: dtype for dtype, name in _SHORT.items()}


def activations(device: torch.device, placement: Placement, store: WeightStore) -> torch.dtype:
    """The type of activations on a device: the best that it is fast with, if none is asked for."""
    if store.exact or device.type == "cpu":
        return torch.float32
    if placement.dtype != "auto":
        return _DTYPES[placement.dtype]
    if device.type == "mps":
        return torch.float16
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (5, 3) else torch.float32


def cache_type(limits: Limits, activations: torch.dtype) -> torch.dtype:
    """The type of keys and values. Raises InvalidRequest for what PyTorch's devices have not."""
    expect(
        limits.kv_dtype != "q8_0",
        "a KV cache in q8_0 is for the device cpu; choose f16 or f32 on other devices",
    )
    if limits.kv_dtype == "f32":
        return torch.float32
    return activations if activations.itemsize == 2 else torch.float16


def described(device: torch.device) -> str:
    """What the device is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "Metal"


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Raises OutOfMemory, with what to do, where PyTorch finds no room."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        plain = type(error) is RuntimeError and not re.search("out of memory|allocate", str(error))
        if plain or isinstance(error, NotImplementedError):
            raise
        raise OutOfMemory(
            f"{what} do not fit in the device's memory; choose a smaller context, fewer rows a "
            "step, smaller weights (quantize), or fewer layers on this device"
        ) from None
