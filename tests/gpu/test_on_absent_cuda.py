"""Whole steps on a CUDA device that is not there: PyTorch's fake tensors have a device and no data.

Nothing may mix devices, wait for the device, or come from the host once a step's inputs are there,
or CUDA could not capture it; kernels are not launched, but looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

import test_program as programs
from formats import random_checkpoint
from gpu.on_torch import Weights
from native_executor import in_memory
from random_gguf import SHAPES
from squall import decoder, executors, quant, recipes
from squall import program as p
from squall.adapters.edits import adaptable
from squall.batch import Batch, Sequences
from squall.executors import Limits, Placement, thread_pool
from squall.executors.devices import Stage
from squall.gpu import executor, graphs, inputs, matrices
from squall.quant import FORMATS
from squall.roles import roles
from squall.spec import Layer, Moe
from squall.weights import Stored, Term, WeightStore

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
LIMITS = Limits(rows={"tokens": 2048, "outputs": 64}, blocks=256, block_size=16)


class OnDevice(TorchDispatchMode):
    """Refuses what a step may not do; FakeTensorMode refuses what waits, and mixed devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not isinstance(leaf, Tensor) or leaf.device == CUDA, func
        return out


class Launches:
    """What kernels are launched with."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert not warmup
        name = kernel.fn.__name__
        names = kernel.arg_names
        known = {key: value for key, value in options.items() if key in names}
        bound = dict(zip(names, args, strict=False)) | known
        assert set(names) == set(bound), name
        allowed = {"num_warps", "num_stages", "enable_fp_fusion"}
        assert options.keys() - known.keys() <= allowed, name
        for at, leaf in ((at, leaf) for at, arg in bound.items() for leaf in tree_leaves(arg)):
            if isinstance(leaf, Tensor):
                assert leaf.device == CUDA, (name, at)
                assert not leaf.ndim or leaf.stride(-1) == 1, (name, at)
            elif isinstance(leaf, int):
                assert -(2**31) <= leaf < 2**31, (name, at)
            else:
                assert leaf is None or isinstance(leaf, str | float), (name, at, leaf)
        sizes = [*(grid(bound) if callable(grid) else grid), 1, 1][:3]
        assert all(isinstance(size, int) and size > 0 for size in sizes), (name, sizes)
        assert max(sizes[1:]) < 2**16, (name, sizes)
        self.names.append(name)


class Faked:
    """Stands for `Matrices`: as they are made on the CPU, and then without data on CUDA."""

    def __init__(self, store: WeightStore, mode: FakeTensorMode) -> None:
        self._real = matrices.Matrices(store, CPU, torch.bfloat16, False)
        self._mode = mode
        self.totals = self._real.totals

    def load(self, weights: Any, pool: Any, progress: Any) -> None:
        with unset_fake_temporarily():
            self._real.load(weights, pool, progress)

    def matrix(self, weight: p.Matrix) -> Any:
        with unset_fake_temporarily():
            return matrices._mapped(self._real.matrix(weight), self._fake)

    def vector(self, weight: p.Vector | None) -> Tensor | None:
        with unset_fake_temporarily():
            return None if weight is None else self._fake(self._real._vectors[weight])

    def _fake(self, tensor: Tensor) -> Tensor:
        with self._mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def sent(stored: Stored, cols: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Stands for `matrices._sent`."""
    width = FORMATS[stored.format].row_bytes(cols)
    data = torch.empty(stored.data.size // width, width, dtype=torch.uint8, device=device)
    factors = stored.factors
    return data, None if factors is None else torch.empty(len(factors), device=device)


@pytest.fixture
def launches() -> Launches:
    return Launches()


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> Iterator[FakeTensorMode]:
    found, own = FakeTensorMode(), executor.TorchExecutor
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *args, **how: launches.run(self, *args, **how)
    )

    def staged(
        arrays: Mapping[str, np.ndarray[Any, Any]], *, pinned: bool
    ) -> tuple[Tensor, inputs.Places]:
        assert pinned
        with unset_fake_temporarily():
            buffer, places = inputs.staged(arrays, pinned=False)
        return found.from_tensor(buffer), places

    def fetched(self: Any, *names: str) -> dict[str, Any]:
        values = {name: self._last[name].float() for name in names}
        assert all(value.device == CUDA for value in values.values())
        return {name: np.zeros(value.shape, np.float32) for name, value in values.items()}

    acted = own._acted

    def checked(self: Any, run: Any) -> graphs.Outputs:
        with OnDevice():
            return acted(self, run)

    def record(act: Callable[[], graphs.Outputs]) -> tuple[Callable[[], object], graphs.Outputs]:
        act()
        return lambda: None, act()

    monkeypatch.setattr(executor, "staged", staged)
    monkeypatch.setattr(executor, "described", lambda _: "absent")
    monkeypatch.setattr(executor.TorchExecutor, "_fetched", fetched)
    monkeypatch.setattr(executor.TorchExecutor, "_acted", checked)
    monkeypatch.setattr(executor.TorchExecutor, "_on_device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(executor.graphs, "cuda_recorder", lambda _: record)
    monkeypatch.setattr(matrices, "_sent", sent)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: id(self), raising=False)
    made: dict[int, Faked] = {}
    monkeypatch.setattr(
        matrices.Matrices, "of",
        lambda store, *_, **__: made.setdefault(id(store), Faked(store, found)),
    )  # fmt: skip
    # PyTorch built without CUDA knows no current device of it: the CPU's stands in.
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    kinds = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    kinds[1] = kinds[1] or kinds[0]
    yield found
    kinds[1] = None


def opened(program: p.Program, checkpoint: Any, limits: Limits, exact: bool) -> Any:
    placement = Placement((Stage("cuda:0"),), exact=exact, dtype="bf16")
    store = WeightStore(checkpoint, plan=quant.Plan())
    return executors.open(program, store, limits, placement=placement, pool=thread_pool(1))


def step(*counts: int, start: int = 40) -> Batch:
    """Sequences with so many rows each."""
    bounds = np.cumsum([0, *counts]).astype(np.int32)
    return Batch(
        tokens=np.zeros(bounds[-1], np.int32),
        positions=np.concatenate([np.arange(start, start + n) for n in counts]).astype(np.int32),
        bounds=bounds,
        block_tables=np.zeros((len(counts), 128), np.int32),
        outputs=bounds[1:] - 1,
    )


STEPS = (step(1), step(1), step(1), step(1, 1, 1), step(1, 1, 1), step(40, 3), step(700),
         step(1, start=600), step(1, start=600), step(*[1] * 64), step(*[1] * 64))  # fmt: skip


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("format_name", ["bf16", "q4_k", "f8_e4m3"])
def test_decoders(format_name: str, exact: bool, mode: FakeTensorMode, launches: Launches) -> None:
    checkpoint = random_checkpoint(SHAPES["tiny"], format_name, normal=True)
    recipe = recipes.load(checkpoint)
    program = decoder.compile(recipe.decoder, recipe.names, context=2048)
    with mode:
        model = opened(program, checkpoint, LIMITS, exact)
        for batch in STEPS:
            assert model.step(batch).shape == (len(batch.outputs), 1024)
    assert sum(graph is not None for graph in model._graphs._graphs.values()) == 4
    assert {"_walk", "_store", "_normalize", "_rotate"} <= set(launches.names)
    assert ("_vector" in launches.names) != exact


@pytest.mark.parametrize("exact", [True, False])
def test_mixtures_of_experts(exact: bool, mode: FakeTensorMode, launches: Launches) -> None:
    kinds = (Moe(4, 2, 24, "silu", normalize=True), Moe(4, 2, 24, "silu", normalize=False))
    layers = [Layer(programs.ATTENTION, moe, programs.NORM) for moe in kinds]
    spec = programs.decoder(*layers, logit_softcap=30.0, context=2048)
    arrays = {
        role: np.zeros((int(np.prod(shape[:-1])), shape[-1]) if shape[1:] else shape, np.float32)
        for role, shape in roles(spec).items()
    }
    program = decoder.compile(spec, programs.names_of(spec), context=2048)
    with mode:
        model = opened(program, in_memory(arrays), LIMITS, exact)
        for batch in STEPS:
            model.step(batch)
    assert sum(graph is not None for graph in model._graphs._graphs.values()) == 4
    assert "_sum" in launches.names


def test_adapters(mode: FakeTensorMode) -> None:
    checkpoint = random_checkpoint(SHAPES["tiny"], "q4_k", normal=True)
    recipe = recipes.load(checkpoint)
    program = adaptable(decoder.compile(recipe.decoder, recipe.names, context=2048))
    with mode:
        model = opened(program, checkpoint, LIMITS, exact=True)
        terms = {}
        for m in (m for op in program.ops if hasattr(op, "adapters") for m in p.matrices(op)):
            a, b = (Stored("f32", np.zeros(32 * n, np.uint8), None) for n in (m.cols, m.rows))
            terms[m.role, 0] = Term(*((b, a) if m.role == "embed" else (a, b)), 8)
        mixture = [(model.adapter(terms), 0.5)]
        for batch in STEPS[:6]:
            rows = np.zeros(len(batch.tokens), np.int32)
            for own in (rows, rows - 1, rows - 1, rows - (np.arange(len(rows)) > 2)):
                model.step(replace(batch, mixture=own.astype(np.int32), mixtures=(mixture,)))
    assert any(model._graphs._graphs.values())


@pytest.mark.parametrize("exact", [True, False])
def test_towers(exact: bool, mode: FakeTensorMode, rng: np.random.Generator) -> None:
    b, weights = p.Builder(), Weights(rng)
    x, index, chosen = b.value("x", 96), p.Index("spans", axes=2), p.Index("chosen", axes=4)
    angles = b.emit(
        p.RopeAngles(b.value("angles", 24), p.Index("at", axes=2), (0.5,) * 12, 1.0, (0, 1) * 6)
    )
    norm = b.emit(
        p.Normalize(
            b.value("norm", 96), x, weights.vector(96), weights.vector(96), "layer", 1e-5, 96
        )
    )
    q, k, v = (
        b.emit(p.Linear(b.value(name, 96), norm, weights.matrix(96, 96), weights.vector(96)))
        for name in "qkv"
    )
    q = b.emit(p.Rotate(b.value("turned", 96), q, angles, 4, 24, False))
    out = b.emit(p.Attend(b.value("out", 96), q, k, v, index, None, 4, 4, 24, 0.2, None, None))
    outs = [
        b.emit(p.GatherRows(b.value(f"gathered{mean}", 96 if mean else 384), out, chosen, mean))
        for mean in (True, False)
    ]
    program = b.build(*outs, inputs=(x,))
    with mode:
        limits = replace(LIMITS, rows={"tokens": 70000})
        model = opened(program, weights.checkpoint(), limits, exact)
        for n in (1, 17, 700, 70000):
            given = {
                "x": np.zeros((n, 96), np.float32), "at": np.zeros((2, n), np.int32),
                "spans": np.stack([np.zeros(n), np.full(n, n)]).astype(np.int32),
                "chosen": np.zeros((4, n), np.int32),
            }  # fmt: skip
            model.run(given)


def test_memories(mode: FakeTensorMode, rng: np.random.Generator) -> None:
    b, weights = p.Builder(), Weights(rng)
    x, seen = b.value("x", 64), p.Index("seen", axes=2)
    out = b.emit(p.Recall(b.value("out", 64), x, seen, 0, 4, 2, 16, 0.25))
    program = replace(b.build(out, inputs=(x,)), memories=(p.CacheLayer(2, 16),), context=99)
    with mode:
        model = opened(program, weights.checkpoint(), LIMITS, exact=True)
        memory = model.memory(40)
        memory.write(0, [np.zeros((40, 32), np.float32)], [np.zeros((40, 32), np.float32)])
        for counts in ((1, 1), (1, 1), (30, 20)):
            n = sum(counts)
            at = step(*counts)
            model.run(
                {"x": np.zeros((n, 64), np.float32), "seen": np.full((2, n), 40, np.int32)},
                Sequences(
                    positions=at.positions,
                    bounds=at.bounds,
                    block_tables=at.block_tables,
                    memories=(memory, None),
                ),
            )


@pytest.mark.parametrize("name", [*FORMATS])
def test_weights_are_taken_apart_there(name: str, mode: FakeTensorMode) -> None:
    format = FORMATS[name]
    stored = Stored(name, np.zeros(8 * format.row_bytes(512), np.uint8), None)
    with mode, OnDevice():
        made = matrices.Matrices(None, CUDA, torch.bfloat16, False)._piece(stored, 512, name)  # type: ignore[arg-type]
    assert made.format in (name, "bf16")
