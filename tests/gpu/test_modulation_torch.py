"""Ops of models that make pictures on PyTorch's devices: against NumPy and the native executor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_modulation as own
from test_executor import relative

from gpu.on_torch import Weights, on_torch
from native_executor import in_memory, opened
from reference_executor import ReferenceExecutor
from squall import executors
from squall.errors import InvalidRequest, UnsupportedModel
from squall.executors import Limits, Placement
from squall.executors.devices import Stage
from squall.executors.sharding import shard
from squall.gpu import linear, rows
from squall.program import (
    Add,
    Attend,
    Builder,
    GroupNormalize,
    Index,
    Linear,
    Modulate,
    Program,
    Value,
)
from squall.weights import WeightStore

FAST = Placement((Stage("torch"),), exact=False)
SPACES = {**own.SPACES, "picture": 300}
placements = pytest.mark.parametrize("placement", [None, FAST], ids=["exact", "fast"])


def executor(program: Program, checkpoint: Any, placement: Placement | None, threads: int) -> Any:
    """On PyTorch's CPU."""
    if placement is None and threads == 1:
        return on_torch(program, checkpoint, SPACES)
    pool, where = executors.thread_pool(threads), placement or Placement((Stage("torch"),))
    store = WeightStore(checkpoint)
    return executors.open(program, store, Limits(rows=SPACES), placement=where, pool=pool)


@placements
@pytest.mark.parametrize("width", own.WIDTHS)
def test_rows_are_modulated(
    width: int, placement: Placement | None, rng: np.random.Generator
) -> None:
    program, checkpoint = own.modulated(width), in_memory({})
    ours = executor(program, checkpoint, placement, 1)
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    for count, text in ((0, 3), (1, 0), (3, 5), (23, 64), (300, 2)):
        inputs = own.given(rng, count, text, width)
        found, wanted = ours.run(inputs), reference.run(inputs)
        for name, out in found.items():
            assert relative(out, wanted[name]) < 1e-5, name
        for row in {0, count // 2, count - 1} if count and not placement else ():
            one = {name: inputs[name][[row]] for name in "xy"}
            alone = ours.run(inputs | one | {"all": inputs["all"][: text + 1]})
            for value in program.outputs:
                if value.rows == "tokens":
                    assert alone[value.name].tobytes() == found[value.name][row].tobytes()


@placements
@pytest.mark.parametrize("reach", [0, 20, 700])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_rows_see_depends_on_how_far_away_it_is(
    reach: int, softcap: float | None, placement: Placement | None, rng: np.random.Generator
) -> None:
    program = own.by_distance(17, reach, keys="picture", softcap=softcap)
    checkpoint = in_memory(own.distances(rng))
    ours = executor(program, checkpoint, placement, 1)
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    for count, keys in ((0, 5), (1, 1), (3, 0), (5, 130), (300, 290)):
        inputs = own.queries(rng, 17, count, keys)
        wanted = reference.run(inputs)["out"]
        np.testing.assert_allclose(ours.run(inputs)["out"], wanted, atol=2e-5)


def convolved(rng: np.random.Generator, width: int) -> tuple[Program, Weights]:
    """Two convolutions of nine taps, of one tap and normalized in groups, each as models have it.

    The second is of other rows than the first.
    """
    b, weights = Builder(), Weights(rng)
    x, other = b.value("x", width, "picture"), b.value("other", 24, "text")
    taps = Index("taps", "picture", 9)
    wide = Linear(
        b.value("wide", 24, "picture"), x, weights.matrix(24, 9 * width), weights.vector(24),
        taps=taps,
    )  # fmt: skip
    one = Linear(
        b.value("one tap", 5, "picture"), x, weights.matrix(5, width), taps=Index("one", "picture")
    )
    outs = [b.emit(wide), b.emit(one)]
    for activation in own.ACTIVATIONS:
        vectors = weights.vector(24, 1.0), weights.vector(24)
        norm = b.value(f"norm {activation}", 24, "picture")
        outs.append(b.emit(GroupNormalize(norm, outs[0], *vectors, 4, 1e-6, activation)))
    small = Linear(
        b.value("small", 24, "text"), outs[-1], weights.matrix(24, 9 * 24), weights.vector(24),
        "silu", 0.7, other, taps=Index("fewer", "text", 9),
    )  # fmt: skip
    return b.build(*outs, b.emit(small), inputs=(x, other)), weights


def pixels(rng: np.random.Generator, width: int, count: int, fewer: int) -> dict[str, Any]:
    drawn = rng.normal(0.3, 2, (count, width)), rng.normal(0, 1, (fewer, 24))
    given: dict[str, Any] = dict(zip(("x", "other"), map(np.float32, drawn), strict=True))
    sizes = {"taps": (9, count), "one": (count,), "fewer": (9, fewer)}
    least = {"taps": -1, "one": -(1 << 31), "fewer": -9}
    indices = {name: rng.integers(least[name], count, size) for name, size in sizes.items()}
    return given | {name: index.astype(np.int32) for name, index in indices.items()}


@placements
@pytest.mark.parametrize("width", [1, 7, 16])
def test_convolutions_and_norms_of_groups(
    width: int,
    placement: Placement | None,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However few rows are gathered at a time, and whatever the threads."""
    program, weights = convolved(rng, width)
    checkpoint = weights.checkpoint()
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    for count, fewer in ((1, 1), (2, 0), (5, 3), (257, 64)):
        inputs = pixels(rng, width, count, fewer)
        found = executor(program, checkpoint, placement, 1).run(inputs)
        for name, wanted in reference.run(inputs).items():
            assert relative(found[name], wanted) < 2e-5, name
        if placement is None:
            with monkeypatch.context() as patch:
                patch.setattr(linear, "_GATHERED", 9 * 24 * 40)
                again = executor(program, checkpoint, placement, 3).run(inputs)
            assert all(again[name].tobytes() == out.tobytes() for name, out in found.items())
    monkeypatch.setattr(rows, "_VALUES", 1000)
    for name, wanted in reference.run(inputs).items():
        assert (
            relative(executor(program, checkpoint, placement, 1).run(inputs)[name], wanted) < 2e-5
        )


@pytest.mark.parametrize("plan", ["q8_0", "q4_k"])
def test_weights_of_integers(plan: str, rng: np.random.Generator) -> None:
    """As those of which the store says that they have become so."""
    b, weights = Builder(), Weights(rng)
    x = b.value("x", 256, "picture")
    op = Linear(b.value("out", 32, "picture"), x, weights.matrix(32, 2304), taps=Index(
        "taps", "picture", 9))  # fmt: skip
    program, checkpoint = b.build(b.emit(op), inputs=(x,)), weights.checkpoint()
    inputs = {
        "x": rng.standard_normal((50, 256), np.float32),
        "taps": rng.integers(-1, 50, (9, 50)).astype(np.int32),
    }
    found = on_torch(program, checkpoint, SPACES, plan=plan).run(inputs)["out"]
    wanted = ReferenceExecutor(program, checkpoint, blocks=1).run(inputs)["out"]
    assert relative(found, wanted) < {"q8_0": 0.02, "q4_k": 0.2}[plan]


def test_bad_inputs_are_refused_on_the_host(rng: np.random.Generator) -> None:
    ours = on_torch(own.modulated(4), in_memory({}), SPACES | {"one": 3})
    inputs = own.given(rng, 5, 2, 4)
    ours.run(inputs)
    with pytest.raises(InvalidRequest, match="as many as there are of both"):
        ours.run(inputs | {"all": np.arange(6, dtype=np.int32)})
    with pytest.raises(InvalidRequest, match="has one row"):
        ours.run(inputs | {"by": np.ones((2, 14), np.float32)})
    program, weights = convolved(rng, 4)
    ours, inputs = on_torch(program, weights.checkpoint(), SPACES), pixels(rng, 4, 6, 2)
    inputs["fewer"][3, 1] = 6
    with pytest.raises(InvalidRequest, match="a chosen row is outside the step"):
        ours.run(inputs)


def test_sizes_that_do_not_fit_are_refused_when_it_opens(rng: np.random.Generator) -> None:
    for name in own.WRONG:
        with pytest.raises(UnsupportedModel, match="sizes do not fit each other at"):
            on_torch(own.wrong(name), in_memory({}), SPACES)
    for change in own.MISMEASURED:
        with pytest.raises(UnsupportedModel, match="sizes do not fit each other at out"):
            on_torch(own.by_distance(4, 1, **change), in_memory(own.distances(rng)), SPACES)
    w, x, out = Weights(rng), Value(0, "x", 8), Value(1, "out", 8)
    for op in (
        GroupNormalize(out, x, w.vector(8), w.vector(8), 3, 1e-6),
        GroupNormalize(out, x, w.vector(4), w.vector(8), 4, 1e-6),
        Linear(out, x, w.matrix(8, 8), taps=Index("taps", axes=9)),
    ):
        program = Program((op,), (x, out), (out,), inputs=(x,))
        with pytest.raises(UnsupportedModel, match="sizes do not fit each other at out"):
            on_torch(program, w.checkpoint(), SPACES)


# ---- in stages, and on ranks ----


def layered(rng: np.random.Generator) -> tuple[Program, Weights]:
    """Two layers that one row modulates, which linears read too."""
    b, weights, width = Builder(), Weights(rng), 64
    x, time = b.value("x", width), b.value("time", width, "one")
    by = b.emit(Add(b.value("by", width, "one"), time, time, activation="silu"))
    for number in range(2):
        both = Linear(b.value(f"both{number}", 3 * width, "one"), by, weights.matrix(192, width))
        b.emit(both)
        modulated = Modulate(b.value(f"modulated{number}", width), x, both.out, 0, 64, 1e-6)
        y = b.value(f"y{number}", width)
        b.emit(Linear(y, b.emit(modulated), weights.matrix(width, width), None, "gelu_tanh"))
        x = b.emit(Add(b.value(f"layers.{number}", width), x, y, gate=both.out, column=128))
    return b.build(x, inputs=(b.values[0], time)), weights


@pytest.mark.parametrize("plan", [None, "q8_0"])
@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_stages_give_the_same_bytes(
    device: str, plan: str | None, rng: np.random.Generator
) -> None:
    program, weights = layered(rng)
    inputs = {
        "x": rng.standard_normal((9, 64), np.float32),
        "time": rng.standard_normal((1, 64), np.float32),
    }
    inputs["time"][0, 5] = 40  # which a linear's int8 form of the row has more digits for
    open = on_torch if device == "torch" else opened
    whole = open(program, weights.checkpoint(), SPACES, plan=plan).run(inputs)["layers.1"]
    made: dict[str, Any] = dict(inputs)
    for part in program.stages("layers.0"):
        made |= open(part, weights.checkpoint(), SPACES, plan=plan).run(made)
    assert made["layers.1"].tobytes() == whole.tobytes()
    wanted = ReferenceExecutor(program, weights.checkpoint(), blocks=1).run(inputs)["layers.1"]
    assert relative(whole, wanted) < (0.05 if plan else 1e-5)


def test_a_placement_on_two_devices(rng: np.random.Generator) -> None:
    program, weights = layered(rng)
    inputs = {
        "x": rng.standard_normal((9, 64), np.float32),
        "time": rng.standard_normal((1, 64), np.float32),
    }
    placement = Placement((Stage("torch", 1), Stage("cpu")))
    ours = executors.open(
        program, WeightStore(weights.checkpoint()), Limits(rows=SPACES), placement=placement,
        pool=executors.thread_pool(1),
    )  # fmt: skip
    wanted = ReferenceExecutor(program, weights.checkpoint(), blocks=1).run(inputs)["layers.1"]
    assert relative(ours.run(inputs)["layers.1"], wanted) < 1e-5


def test_ranks_all_compute_what_cannot_be_shared_out(rng: np.random.Generator) -> None:
    """Heads that see distances, and convolutions; of the rest each has a part."""
    b, weights = Builder(), Weights(rng)
    x, spans = b.value("x", 64), Index("spans", axes=2)
    q, k, v = (b.emit(Linear(b.value(n, 64), x, weights.matrix(64, 64))) for n in "qkv")
    attend = Attend(
        b.value("seen", 64), q, k, v, spans, None, 4, 4, 16, 1.0, None, None,
        weights.vector(12), (0, 1, 2),
    )  # fmt: skip
    y = b.emit(Linear(b.value("y", 64), b.emit(attend), weights.matrix(64, 64)))
    z = b.emit(Linear(b.value("z", 64), y, weights.matrix(64, 64), None, "silu"))
    taps = Index("taps", axes=9)
    conv = b.emit(Linear(b.value("conv", 64), z, weights.matrix(64, 9 * 64), taps=taps))
    up = b.emit(Linear(b.value("up", 64), conv, weights.matrix(64, 64), None, "silu"))
    down = b.emit(Linear(b.value("down", 64), up, weights.matrix(64, 64)))
    program = b.build(down, inputs=(x,))
    store = WeightStore(weights.checkpoint())
    inputs: dict[str, Any] = {
        "x": rng.standard_normal((9, 64), np.float32),
        "spans": np.array([[0] * 9, [9] * 9], np.int32),
        "taps": rng.integers(-1, 9, (9, 9)).astype(np.int32),
    }
    wanted = ReferenceExecutor(program, weights.checkpoint(), blocks=1).run(inputs)["down"]
    parts = []
    for rank in range(2):
        part = shard(program, store, rank, 2)
        *ops, _ = part.ops
        assert [op.out.name for op in ops] == [*"qkv", "seen", *"yz", "conv", "up", "down.part"]
        partial = replace(part, ops=tuple(ops), outputs=(ops[-1].out,))
        reference = ReferenceExecutor(partial, weights.checkpoint(), blocks=1)
        parts.append(reference.run(inputs)["down.part"])
    assert relative(parts[0] + parts[1], wanted) < 1e-5


def test_by_tritons_kernels(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted: norms, products and attention are theirs where they run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program, weights = layered(rng)
    inputs = {"x": rng.standard_normal((3, 64), np.float32), "time": np.ones((1, 64), np.float32)}
    ours = on_torch(program, weights.checkpoint(), SPACES)
    wanted = ReferenceExecutor(program, weights.checkpoint(), blocks=1).run(inputs)
    assert relative(ours.run(inputs)["layers.1"], wanted["layers.1"]) < 1e-5
    program, weights = convolved(rng, 4)
    ours, inputs = on_torch(program, weights.checkpoint(), SPACES), pixels(rng, 4, 5, 2)
    wanted = ReferenceExecutor(program, weights.checkpoint(), blocks=1).run(inputs)
    for name, out in ours.run(inputs).items():
        assert relative(out, wanted[name]) < 2e-5, name
    program, checkpoint = own.by_distance(8, 3), in_memory(own.distances(rng))
    inputs = own.queries(rng, 8, 6, 6)
    found, wanted = (
        executor.run(inputs)["out"]
        for executor in (
            on_torch(program, checkpoint, SPACES),
            ReferenceExecutor(program, checkpoint, blocks=1),
        )
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5)
