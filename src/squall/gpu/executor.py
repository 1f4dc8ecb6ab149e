"""The executor of PyTorch's devices: one op of the program after another, or a CUDA graph."""

from __future__ import annotations

import functools
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squall import program as p
from squall.batch import Mixture, Sequences
from squall.errors import OutOfMemory, UnsupportedModel
from squall.executors import Adapter, Executor, Floats, Limits, Memory, Order, Phase, Placement
from squall.executors.base import NO_SEQUENCES, layout_of, sites_of
from squall.gpu import attention, graphs, ops
from squall.gpu.adapters import TorchAdapter, TorchMixture
from squall.gpu.inputs import Given, Inputs, expect, staged, views
from squall.gpu.matrices import FLOAT_NAMES, FLOATS, Matrices, floats_fit
from squall.gpu.profile import Profile
from squall.weights import Progress, Term, WeightStore


class TorchMemory:
    """See `executors.Memory`. at: keys and values of each of the program's memories."""

    def __init__(
        self, layers: tuple[p.CacheLayer, ...], rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.like, self.rows = (layers, dtype), rows
        widths = [layer.kv_heads * layer.head_dim for layer in layers]
        both = [torch.zeros(2, rows, width, dtype=dtype, device=device) for width in widths]
        self.at = [(pair[0], pair[1]) for pair in both]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for pair in self.at for part in pair)

    def write(self, first: int, keys: Sequence[Floats], values: Sequence[Floats]) -> None:
        new = [
            np.ascontiguousarray(rows) for pair in zip(keys, values, strict=False) for rows in pair
        ]
        own = [part for pair in self.at for part in pair]
        count = len(new[0]) if new else 0
        fits = len(keys) == len(values) == len(self.at) and 0 <= first <= self.rows - count
        fits = fits and all(a.shape == (count, b.shape[1]) for a, b in zip(new, own, strict=True))
        expect(fits, "keys and values are of each memory, of rows it has, and as wide as its heads")
        for part, rows in zip(own, new, strict=True):
            part[first : first + count] = torch.from_numpy(rows)


class TorchExecutor(Executor):
    """Runs a program on one device, one run at a time, whether they are patient or not."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        limits = order.limits
        name = self.placement.stages[0].device
        self._device = torch.device("cpu" if name == "torch" else name)
        self._dtype = activations(self._device, self.placement, order.store)
        self._kv_dtype = cache_type(limits, self._dtype)
        self.isa = f"{name} {described(self._device)} ({FLOAT_NAMES[self._dtype]})"
        self._lock = threading.Lock()
        self._inputs = Inputs(order.program, limits)
        held = self._kept | {value.name for value in self.program.outputs}
        self._held = tuple(value for value in self.program.values if value.name in held)
        self._last: dict[str, Tensor] = {}
        self._profile: Profile | None = None
        with memory_errors("the KV cache"), self._on_device():
            self._caches = [
                attention.Cache(self.blocks * self.block_size, layer, self._kv_dtype, self._device)
                for layer in order.program.caches
            ]
        self.kv_bytes = sum(cache.nbytes for cache in self._caches)

    def _load(self, store: WeightStore, progress: Progress | None) -> None:
        program = store.arranged(self.program)
        if wrong := next((op for op in program.ops if not ops.fits(op)), None):
            raise UnsupportedModel(
                f"this model cannot run: sizes do not fit each other at {wrong.out.name}"
            )
        floats = floats_fit(program.weights(), self._device)
        weights = Matrices.of(store, self._device, self._dtype, floats)
        with memory_errors("the weights"), self._on_device():
            weights.load(program.weights(), self.pool, progress)
            self._types = ops.types(program, self._dtype)
            lowering = ops.Lowering(
                weights, self._caches, self._device, self._types, self.placement.exact,
                self.placement.ranks,
            )  # fmt: skip
            acts = [ops.lower(op, lowering) for op in program.ops]
        kinds = [self._types[op.out] for op in program.ops]
        self._steps = list(zip(program.ops, acts, kinds, self._dying(program), strict=True))
        self._sites = sites_of(program)
        self._layout = layout_of(self._sites)
        cuda = self._device.type == "cuda"
        self._graphs = graphs.Graphs(graphs.cuda_recorder(self._device)) if cuda else None
        self._weights = weights
        self.formats = weights.totals(program.weights())

    def _dying(self, program: p.Program) -> list[set[int]]:
        """The values that nothing reads after an op, for each op."""
        needed = {value.id for value in self._held}
        found: list[set[int]] = []
        for op in reversed(program.ops):
            found.append({value.id for value in (*p.reads(op), op.out)} - needed)
            needed |= found[-1]
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
        with memory_errors("an adapter"), self._on_device():
            return TorchAdapter.of(self._sites, terms, self._device)

    def memory(self, rows: int) -> Memory:
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
        at = sequences or NO_SEQUENCES
        given = self._inputs.checked(Given(*self._given(inputs)), at, len(mixtures))
        self._check_made_here(at, mixtures)
        with self._lock, memory_errors("a step"), self._on_device():
            outputs = self._outputs(given, at, mixtures)
            self._last = {v.name: outputs[v.name][: given.rows[v.rows]] for v in self._held}
            return self._fetched(*(value.name for value in self.program.outputs))

    def _check_made_here(self, at: Sequences, mixtures: Sequence[Mixture]) -> None:
        fits = all(
            isinstance(adapter, TorchAdapter) and adapter.layout == self._layout
            for mixture in mixtures for adapter, _ in mixture
        )  # fmt: skip
        expect(fits, "an adapter was made for another model")
        like = (self.program.memories, self._kv_dtype)
        fits = all(isinstance(m, TorchMemory) and m.like == like for m in at.memories if m)
        expect(fits, "a memory was made for another model")

    def _outputs(self, given: Given, at: Sequences, mixtures: Sequence[Mixture]) -> graphs.Outputs:
        """Outputs and kept values on the device; there may be more rows than are wanted."""
        few = self._few(given, at)
        given = given if few is None else self._inputs.padded(given, few)
        arrays: dict[str, NDArray[np.generic]] = {**given.indices, **given.values}
        for name, groups in given.groups.items():
            arrays |= {f"{name}.{i}": group for i, group in enumerate(groups)}
        placed: Mapping[str, NDArray[np.int32]] = {}
        shape = None
        if self._inputs.cached:
            rows = None if few is None else few["tokens"]
            placed, shape = attention.layout(at, self.block_size, rows=rows)
            arrays |= {f"at.{name}": array for name, array in placed.items()}
        # A graph is of any bounds.
        bounds = at.bounds.tolist() if few is None else None
        buffer, places = staged(arrays, pinned=self._device.type == "cuda")

        def body(inputs: Tensor) -> graphs.Outputs:
            tensors = views(inputs, places)
            own = {name: tensors[f"at.{name}"] for name in placed}
            run = ops.Run(
                values={v.id: tensors[v.name].to(self._types[v]) for v in self.program.inputs},
                indices=tensors,
                rows=None if shape is None else attention.Rows(own, shape, self.block_size, bounds),
                memories=cast(Sequence[TorchMemory | None], at.memories),
                mixtures=cast(Sequence[TorchMixture], mixtures),
                given=given,
            )
            return self._acted(run)

        if self._profile is not None:
            self._profile.begin(given, at)
        if few is None or self._graphs is None:
            return body(buffer.to(self._device, non_blocking=True))
        return self._graphs.run((places, shape), buffer, self._device, body)

    def _few(self, given: Given, at: Sequences) -> Mapping[str, int] | None:
        """Rows of each space for a graph; None: it is none for that."""
        special = any([*given.segments.values(), *given.groups.values(), *at.memories])
        if special or not (self._graphs and self._inputs.cached) or self._profile:
            return None
        most = {"tokens": graphs.MOST_ROWS, "outputs": graphs.MOST_ROWS}
        if any(count > most.get(space, 0) for space, count in given.rows.items()):
            return None
        return {space: graphs.padded_rows(count) for space, count in given.rows.items()}

    def _acted(self, run: ops.Run) -> graphs.Outputs:
        for number, (op, act, dtype, dying) in enumerate(self._steps):
            now = functools.partial(act, run)
            out = self._profile.act(number, op, now) if self._profile else now()
            run.values[op.out.id] = out.to(dtype)
            for value in dying:
                del run.values[value]
        return {value.name: run[value] for value in self._held}

    def _fetched(self, *names: str) -> dict[str, Floats]:
        """Values of the last run on the host: the one time that it waits for the device."""
        cuda, host = self._device.type == "cuda", {}
        for name in names:
            found = self._last[name].float()
            own = found.new_empty(found.shape, device="cpu", pin_memory=cuda)
            host[name] = own.copy_(found, non_blocking=cuda)
        if cuda:
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
        with self._lock, self._on_device():
            kept = name in self._kept and name in self._last
            expect(kept, "only a kept value can be read after a step")
            return self._fetched(name)[name]


def activations(device: torch.device, placement: Placement, store: WeightStore) -> torch.dtype:
    """The type of activations on a device: the best that it is fast with, if none is asked for."""
    if store.exact or device.type == "cpu":
        return torch.float32
    if placement.dtype != "auto":
        return FLOATS[placement.dtype]
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
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not full:
            raise
        traceback.clear_frames(error.__traceback__)  # whoever has the error has no tensors
        raise OutOfMemory(
            f"there is no room for {what} in the device's memory: choose a smaller context or "
            "quantized weights, or give it fewer layers"
        ) from None
