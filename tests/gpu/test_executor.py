"""Every op on PyTorch's devices, against NumPy and the native executor; and rows alone by bytes."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import test_attention as attending
import test_low_rank
import test_rows
import torch

from gpu.on_torch import Array, Weights, on_torch
from native_executor import in_memory, opened
from reference_executor import ReferenceExecutor
from squall.adapters.edits import adaptable
from squall.batch import Sequences
from squall.errors import InvalidRequest, OutOfMemory, UnsupportedModel
from squall.program import (
    Add,
    Attend,
    Builder,
    Concatenate,
    Embed,
    GatedLinear,
    GatherColumns,
    GatherRows,
    Index,
    Linear,
    MixtureOfExperts,
    Normalize,
    Overlay,
    Program,
    RopeAngles,
    Rotate,
    Softcap,
    Value,
)
from squall.quant import Plan

ROWS = (1, 2, 3, 8, 17)
SPACES = {"tokens": 64, "outputs": 64, "patches": 64, "images": 64}


def relative(found: Array, wanted: Array) -> float:
    """The largest difference, relative to the largest value, which counts as 1 at least."""
    return float(np.abs(found - wanted).max(initial=0) / max(1, np.abs(wanted).max(initial=0)))


def agree(program: Program, weights: Weights, inputs: dict[str, Any], axis: dict[str, int]) -> None:
    """With NumPy and the native executor, and rows alone. axis: of the inputs' rows, by name."""
    checkpoint = weights.checkpoint()
    found = on_torch(program, checkpoint, SPACES).run(inputs)
    wanted = ReferenceExecutor(program, checkpoint, blocks=1).run(inputs)
    native = opened(program, checkpoint, SPACES).run(inputs)
    executor = on_torch(program, checkpoint, SPACES)
    rows = len(next(iter(found.values())))
    for name, out in found.items():
        assert relative(out, wanted[name]) < 1e-5, name
        assert relative(out, native[name]) < 1e-5, name
    for row in {0, rows // 2, rows - 1}:
        one = {name: np.take(array, [row], axis.get(name, 0)) for name, array in inputs.items()}
        for name, out in executor.run(one).items():
            assert out.tobytes() == found[name][row].tobytes(), (name, row)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [2, 7, 33, 640, 40000])
def test_norms(rows: int, width: int, rng: np.random.Generator) -> None:
    b, weights = Builder(), Weights(rng)
    x = b.value("x", 3 * width)
    outs = [
        b.emit(
            Normalize(
                b.value(f"{kind}.{size}.{group}.{width}", x.width), x,
                weights.vector(size, 1.0), bias, kind, 1e-5, group,
            )
        )
        for kind, (size, group) in itertools.product(
            ("rms", "layer"), ((width, width), (3 * width, width), (3 * width, 3 * width))
        )
        for bias in (weights.vector(size) if kind == "layer" else None,)
    ]  # fmt: skip
    # Neighbours are apart: of two that are nearly equal, float32 hardly has the difference.
    values = rng.normal(0.3, 2, (rows, x.width)) + np.arange(x.width) % 2 * 20
    inputs = {"x": values.astype(np.float32)}
    agree(b.build(*outs, inputs=(x,)), weights, inputs, {})


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations(rows: int, interleaved: bool, rng: np.random.Generator) -> None:
    """Of some of the columns of every head; with one axis, and with three."""
    b, heads, dim = Builder(), 3, 22
    x, outs = b.value("x", heads * dim), []
    frequencies = tuple(np.float32(1e4 ** -(i / 9)).item() for i in range(9))
    for name, axes, order in (("at", 1, ()), ("places", 3, (0, 1, 2) * 3)):
        positions = Index(name, axes=axes)
        angles = b.emit(
            RopeAngles(b.value(f"angles.{name}", 18), positions, frequencies, 1.25, order)
        )
        turned = Rotate(b.value(f"of.{name}", x.width), x, angles, heads, dim, interleaved)
        outs += [angles, b.emit(turned)]
    inputs = {
        "x": rng.standard_normal((rows, x.width), np.float32),
        "at": rng.integers(0, 90, rows).astype(np.int32),
        "places": rng.integers(0, 90, (3, rows)).astype(np.int32),
    }
    agree(b.build(*outs, inputs=(x,)), Weights(rng), inputs, {"places": 1})


def test_angles_of_far_positions(rng: np.random.Generator) -> None:
    """As the native executor has them, which multiplies in float32 as transformers does."""
    b = Builder()
    frequencies = tuple(np.float32(5e5 ** -(i / 32)).item() for i in range(32))
    program = b.build(b.emit(RopeAngles(b.value("out", 64), Index("at"), frequencies)))
    inputs = {"at": np.sort(rng.integers(0, 1 << 20, 64)).astype(np.int32)}
    found, native = (
        open(program, in_memory({}), SPACES).run(inputs) for open in (on_torch, opened)
    )
    np.testing.assert_allclose(found["out"], native["out"], atol=2e-7)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", None])
def test_products(rows: int, activation: Any, rng: np.random.Generator) -> None:
    b, weights = Builder(), Weights(rng)
    x, y = b.value("x", 67), b.value("y", 37)
    outs = [
        Linear(b.value("plain", 37), x, weights.matrix(37, 67), None, activation),
        Linear(
            b.value("all", 37), x, weights.matrix(37, 67), weights.vector(37), activation, 0.7, y
        ),
        Linear(b.value("one", 1), x, weights.matrix(1, 67), weights.vector(1), activation, -2.0),
    ]
    gated = [
        GatedLinear(
            b.value(f"gated{i}", 37), x, weights.matrix(37, 67), weights.matrix(37, 67),
            activation or "silu", *biases,
        )
        for i, biases in enumerate(((), (weights.vector(37), weights.vector(37))))
    ]  # fmt: skip
    inputs = {v.name: rng.standard_normal((rows, v.width), np.float32) for v in (x, y)}
    agree(b.build(*map(b.emit, [*outs, *gated]), inputs=(x, y)), weights, inputs, {})


@pytest.mark.parametrize("rows", ROWS)
def test_rows_put_together(rows: int, rng: np.random.Generator) -> None:
    b, weights, width = Builder(), Weights(rng), 33
    ids, x, y = Index("ids"), b.value("x", width), b.value("y", 5)
    order = rng.permutation(width)[:7].astype("<u4")
    outs = [
        b.emit(Embed(b.value("embed", width), ids, weights.matrix(29, width), 1.5)),
        b.emit(Softcap(b.value("capped", width), x, 3.0)),
        b.emit(Add(b.value("sum", width), x, x, 0.1)),
        b.emit(Add(b.value("twice", width), x, x)),
        b.emit(Concatenate(b.value("beside", width + 5), x, y)),
        b.emit(GatherColumns(b.value("ordered", 7), x, order.tobytes())),
    ]
    inputs: dict[str, Any] = {
        v.name: rng.normal(0, 3, (rows, v.width)).astype(np.float32) for v in (x, y)
    }
    inputs["ids"] = rng.integers(0, 29, rows).astype(np.int32)
    agree(b.build(*outs, inputs=(x, y)), weights, inputs, {})


@pytest.mark.parametrize("images", [0, 1, 5, 23])
def test_rows_of_images(images: int, rng: np.random.Generator) -> None:
    program, checkpoint = test_rows.placed(33), in_memory({})
    inputs = test_rows.given(rng, 17, images, 33)
    found = on_torch(program, checkpoint, SPACES).run(inputs)
    native = opened(program, checkpoint, SPACES).run(inputs)
    for name, out in found.items():
        assert out.tobytes() == native[name].tobytes(), name


def test_an_index_that_chooses_none_gathers_nothing() -> None:
    b, place = Builder(), Index("place")
    x, rows = b.value("x", 4), b.value("rows", 4)
    overlaid = b.emit(Overlay(b.value("overlaid", 4), x, rows, place))
    gathered = b.emit(GatherRows(b.value("gathered", 4), x, place))
    executor = on_torch(b.build(overlaid, gathered, inputs=(x, rows)), in_memory({}), SPACES)
    inputs = {name: np.ones((2, 4), np.float32) for name in ("x", "rows")}
    executor.run({**inputs, "place": np.array([0, 1], np.int32)})
    with pytest.raises(InvalidRequest, match="a chosen row is outside the step"):
        executor.run({**inputs, "place": np.array([0, -1], np.int32)})


# ---- attention ----


@pytest.mark.parametrize("dim", [1, 17, 80, 128])
@pytest.mark.parametrize("window", [None, 20])
def test_attention(dim: int, window: int | None, rng: np.random.Generator) -> None:
    """Cached in blocks, one sequence and several; and not, where all rows see each other."""
    for cached, runs in itertools.product((False, True), ([(0, 70)], [(0, 7), (0, 1), (0, 62)])):
        program, checkpoint = (
            attending.attention(dim, cached=cached, window=window),
            in_memory({}),
        )
        at = attending.sequences(runs) if cached else None
        rows = sum(stop for _, stop in runs)
        inputs = attending.drawn(rng, dim, rows, rows)
        own = np.concatenate([np.arange(stop) for _, stop in runs]) if cached else np.arange(rows)
        inputs["spans"] = np.stack([own // 3, own + 1]).astype(np.int32)
        limits: dict[str, Any] = {"blocks": attending.BLOCKS, "kv_dtype": "f32"}
        wanted = ReferenceExecutor(program, checkpoint, blocks=attending.BLOCKS)
        found = on_torch(program, checkpoint, {"tokens": 512}, **limits).run(inputs, at)["out"]
        assert relative(found, wanted.run(inputs, at)["out"]) < 1e-5


def test_sequences_recall_their_memories(rng: np.random.Generator) -> None:
    program, checkpoint = attending.recalling(17), in_memory({})
    executor = on_torch(program, checkpoint, {"tokens": 64}, kv_dtype="f32", blocks=40)
    reference = ReferenceExecutor(program, checkpoint, blocks=40)
    made = executor.memory(50), reference.memory(50)
    assert made[0].rows == 50
    assert made[0].nbytes == sum(pair.nbytes for pair in made[1].at)
    attending.fill(made, rng, 17, 50)
    runs = [(0, 20), (7, 8), (3, 5)]
    q = rng.standard_normal((23, attending.HEADS * 17), np.float32)
    seen = np.stack([rng.integers(0, 20, 23), rng.integers(20, 51, 23)]).astype(np.int32)
    inputs = {"q": q, "seen": seen}
    found, wanted = (
        open.run(inputs, attending.sequences(runs, (memory, None, memory)))
        for open, memory in zip((executor, reference), made, strict=True)
    )
    for name, out in wanted.items():
        assert relative(found[name], out) < 1e-5
        assert not found[name][20].any()
    nothing = executor.run(inputs, attending.sequences(runs))
    assert not any(out.any() for out in nothing.values())


def test_memories_that_do_not_fit_are_refused() -> None:
    def make(dim: int, **more: Any) -> Any:
        program = attending.recalling(dim)
        return on_torch(program, in_memory({}), {"tokens": 64}, blocks=40, **more)

    executor = make(16)
    memory, inputs = executor.memory(10), {"q": np.zeros((2, 64), np.float32)}
    inputs["seen"] = np.array([[0, 0], [9, 9]], np.int32)  # type: ignore[assignment]
    executor.run(inputs, attending.sequences([(0, 2)], (memory,)))
    for other in (make(17), make(16, kv_dtype="f32")):
        with pytest.raises(InvalidRequest, match="made for another model"):
            executor.run(inputs, attending.sequences([(0, 2)], (other.memory(10),)))
    with pytest.raises(InvalidRequest, match="a position that is not there"):
        executor.run(inputs, attending.sequences([(0, 2)], (executor.memory(8),)))
    for memories in ((memory, memory), (object(),)):
        with pytest.raises(InvalidRequest):
            executor.run(inputs, attending.sequences([(0, 2)], memories))
    for rows in (0, -1, 2**31, 2**70):
        with pytest.raises(InvalidRequest):
            executor.memory(rows)
    good = [np.zeros((3, heads * 16), np.float32) for heads in (2, 4)]
    for first, keys in ((8, good), (2**40, good), (0, good[:1]), (0, good[::-1]), (0, good * 2)):
        with pytest.raises(ValueError, match="keys and values"):
            memory.write(first, keys, keys)


# ---- mixtures of experts, and adapters ----


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("jitter", [None, 0.1])
@pytest.mark.parametrize("shared", [False, True])
def test_mixtures_of_experts(
    rows: int, jitter: float | None, shared: bool, rng: np.random.Generator
) -> None:
    if shared and jitter:
        return None
    b, weights, experts, width, wide = Builder(), Weights(rng), 7, 33, 19
    x, outs = b.value("x", width), []
    for gated, biased, normalize in itertools.product((True, False), (True, False), (True, False)):
        up, down = weights.matrix(wide, width, experts), weights.matrix(width, wide, experts)
        sizes = (1, wide if gated else 0, wide, width)
        biases = [weights.vector(experts * n) if n and biased else None for n in sizes]
        op = MixtureOfExperts(
            b.value(f"moe{len(outs)}", width), x, weights.matrix(experts, width),
            weights.matrix(wide, width, experts) if gated else None, up, down,
            1 if shared else 3, "silu", normalize, jitter, 0.7, x if biased else None, None,
            *biases, Index("shared") if shared else None,
        )  # fmt: skip
        outs.append(b.emit(op))
    program, checkpoint = b.build(*outs, inputs=(x,)), weights.checkpoint()
    inputs: dict[str, Any] = {"x": rng.normal(0, 1, (rows, width)).astype(np.float32)}
    if not shared:
        return agree(program, weights, inputs, {})
    inputs["shared"] = np.maximum.accumulate(
        np.where(np.arange(rows) % 5 == 0, np.arange(rows), 0)
    ).astype(np.int32)
    found = on_torch(program, checkpoint, SPACES).run(inputs)
    wanted = ReferenceExecutor(program, checkpoint, blocks=1).run(inputs)
    first = {"x": inputs["x"][:5], "shared": inputs["shared"][:5]}
    alone = on_torch(program, checkpoint, SPACES).run(first)
    for name, out in found.items():
        assert relative(out, wanted[name]) < 1e-5
        assert out[:5].tobytes() == alone[name].tobytes()
    return None


def test_of_equal_experts_the_first_is_chosen(rng: np.random.Generator) -> None:
    b, weights = Builder(), Weights(rng)
    x = b.value("x", 8)
    op = MixtureOfExperts(
        b.value("out", 8), x, weights.matrix(5, 8), None, weights.matrix(4, 8, 5),
        weights.matrix(8, 4, 5), 2, "silu", True,
    )  # fmt: skip
    weights.arrays[op.router.role][:] = 0
    inputs = {"x": rng.standard_normal((9, 8), np.float32)}
    agree(b.build(b.emit(op), inputs=(x,)), weights, inputs, {})


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_get_what_their_adapters_add(scaled: bool, rng: np.random.Generator) -> None:
    own = test_low_rank
    arrays = {n: rng.normal(0, 0.3, size).astype(np.float32) for n, size in own.SIZES.items()}
    width = 3 * len(own.COLUMNS)
    plain = own.program()
    edited = adaptable(plain, own.COLUMNS, width) if scaled else adaptable(plain)
    executor, without = (on_torch(one, in_memory(arrays), SPACES) for one in (edited, plain))
    adapters = [own.Made(executor, edited, int(rng.integers(2**31))) for _ in range(4)]
    of_rows = own.Rows(arrays, edited, adapters)
    given = of_rows.of_executor()
    for rows in (*ROWS, 64):
        ids = rng.integers(0, own.VOCAB, rows).astype(np.int32)
        mixture = rng.integers(-1, len(given), rows).astype(np.int32)
        mixture.sort() if rows % 2 else None
        scalings = rng.normal(0, 1, (rows, width)).astype(np.float32)
        inputs = own.inputs(ids, mixture, scalings if scaled else None)
        found = executor.run(inputs, mixtures=given)
        bare = without.run(own.inputs(ids, mixture, None))
        for row in rng.permutation(rows)[:4].tolist():
            mine = scalings[row] if scaled else None
            wanted = of_rows.expected(int(ids[row]), int(mixture[row]), mine)
            one = own.inputs(ids[[row]], mixture[[row]], None if mine is None else mine[None])
            alone = executor.run(one, mixtures=given)
            for name in own.OUTPUTS:
                assert np.array_equal(alone[name][0], found[name][row]), (name, rows)
                np.testing.assert_allclose(found[name][row], wanted[name], rtol=2e-3, atol=2e-4)
                if mixture[row] < 0:
                    assert np.array_equal(bare[name][row], found[name][row]), name


def test_adapters_that_do_not_fit_are_refused(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        test_low_rank, "opened", lambda arrays, edited: on_torch(edited, in_memory(arrays), SPACES)
    )
    arrays = {
        name: rng.normal(0, 0.3, size).astype(np.float32)
        for name, size in test_low_rank.SIZES.items()
    }
    test_low_rank.test_adapters_that_do_not_fit_are_refused(arrays)
    edited = adaptable(test_low_rank.program())
    executor, native = (open(edited, in_memory(arrays), SPACES) for open in (on_torch, opened))
    given = test_low_rank.inputs(np.zeros(1, np.int32), np.zeros(1, np.int32), None)
    with pytest.raises(InvalidRequest, match="made for another model"):
        executor.run(given, mixtures=(((native.adapter({}), 1.0),),))


# ---- what is refused ----


def embedding(**more: Any) -> Any:
    b = Builder()
    x = b.emit(
        Embed(b.value("x", 4), Index("tokens"), Weights(np.random.default_rng()).matrix(9, 4))
    )
    chosen = b.emit(GatherRows(b.value("logits", 4, "outputs"), x, Index("outputs", "outputs")))
    table = {"m0": np.arange(36, dtype=np.float32).reshape(9, 4)}
    return on_torch(b.build(chosen), in_memory(table), SPACES, **more)


def test_bad_inputs_are_refused_on_the_host() -> None:
    executor = embedding()
    good = {"tokens": np.array([3, 8], np.int32), "outputs": np.array([1], np.int32)}
    assert executor.run(good)["logits"].tolist() == [[32, 33, 34, 35]]
    wide = {name: index.astype(np.int64) for name, index in good.items()}
    assert executor.run(wide)["logits"].tolist() == [[32, 33, 34, 35]]
    long = np.zeros(65, np.int32)
    for change, message in (
        ({"tokens": np.array([3, 9], np.int32)}, "outside the vocabulary"),
        ({"tokens": np.array([-1, 0], np.int32)}, "outside the vocabulary"),
        ({"tokens": np.array([1.0, 0.0])}, "not of whole numbers"),
        ({"tokens": np.array([1 << 40, 0])}, "does not fit int32"),
        ({"tokens": long}, "too many rows"),
        ({"outputs": np.array([2], np.int32)}, "a chosen row is outside the step"),
        ({"outputs": np.array([-1], np.int32)}, "a chosen row is outside the step"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            executor.run(good | change)
    with pytest.raises(InvalidRequest, match="lacks 'outputs', which the program asks for"):
        executor.run({"tokens": good["tokens"]})
    assert executor.run(good)["logits"].shape == (1, 4)


def test_sizes_that_do_not_fit_are_refused_when_it_opens(rng: np.random.Generator) -> None:
    """Of each op one size is another than it needs."""
    w = Weights(rng)
    x, y, wide = Value(0, "x", 8), Value(1, "logits", 8), Value(2, "wide", 12)
    square, spans = w.matrix(8, 8), Index("spans", axes=2)
    heads: dict[str, int] = {"heads": 2, "kv_heads": 1, "head_dim": 4}
    few = Value(3, "few", 4)
    mixture: dict[str, Any] = {
        "top_k": 2, "activation": "silu", "normalize": True, "router": w.matrix(3, 8),
        "gate": w.matrix(5, 8, 3), "up": w.matrix(5, 8, 3), "down": w.matrix(8, 5, 3),
    }  # fmt: skip
    ops: list[Any] = [
        Embed(y, Index("tokens"), w.matrix(9, 4)),
        Normalize(y, x, w.vector(6), None, "rms", 1e-5, 8),
        Normalize(y, x, w.vector(8), w.vector(4), "layer", 1e-5, 8),
        Normalize(y, x, w.vector(3), None, "rms", 1e-5, 3),
        Linear(y, x, w.matrix(8, 4)),
        Linear(y, x, w.matrix(4, 8)),
        Linear(y, x, square, w.vector(1)),
        Linear(y, x, square, residual=wide),
        GatedLinear(y, x, square, w.matrix(4, 8), "silu"),
        GatedLinear(y, x, square, square, "silu", w.vector(1)),
        Rotate(y, x, wide, 2, 4, False),
        Rotate(y, x, few, 3, 4, False),
        Attend(y, x, x, few, spans, None, **heads, scale=1.0, window=None, softcap=None),
        Attend(y, wide, few, few, spans, None, **heads, scale=1.0, window=None, softcap=None),
        Add(y, x, few),
        *(
            MixtureOfExperts(y, x, **{**mixture, **change})
            for change in (
                {"top_k": 4}, {"router": square}, {"gate": w.matrix(4, 8, 3)},
                {"down": w.matrix(8, 5, 2)}, {"up_bias": w.vector(5)},
            )
        ),
    ]  # fmt: skip
    for op in ops:
        program = Program((op,), (x, y, wide, few), (y,), inputs=(x, wide, few))
        with pytest.raises(UnsupportedModel, match="sizes do not fit each other at logits"):
            on_torch(program, w.checkpoint(), SPACES)
        with pytest.raises(UnsupportedModel):
            opened(program, w.checkpoint(), SPACES)


def test_bad_sequences_are_refused_on_the_host(rng: np.random.Generator) -> None:
    program = attending.attention(16, cached=True)
    executor = on_torch(program, in_memory({}), {"tokens": 64}, blocks=40)
    inputs = attending.drawn(rng, 16, 5, 5)
    inputs["spans"] = np.stack([np.zeros(5), [1, 2, 3, 1, 2]]).astype(np.int32)
    good = {
        "positions": np.array([0, 1, 2, 0, 1], np.int32), "bounds": np.array([0, 3, 5], np.int32),
        "block_tables": np.array([[3], [39]], np.int32),
    }  # fmt: skip
    executor.run(inputs, Sequences(**good))
    for name, value, message in (
        ("positions", [0, 1, 3, 0, 1], "ascend by one"),
        ("positions", [-1, 0, 1, 0, 1], "outside the context"),
        ("positions", [638, 639, 640, 0, 1], "outside the context"),
        ("positions", [15, 16, 17, 0, 1], "shorter than its sequence"),
        ("positions", [0, 1, 2, 0], "a position for each"),
        ("bounds", [0, 4, 3], "bounds must ascend"),
        ("bounds", [1, 3, 5], "bounds must ascend"),
        ("bounds", [0, 5], "one block table a sequence"),
        ("block_tables", [[3], [40]], "outside the KV cache"),
        ("block_tables", [[-1], [4]], "outside the KV cache"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            executor.run(inputs, Sequences(**good | {name: np.array(value, np.int32)}))
    inputs["spans"][1, 2] = 4
    with pytest.raises(InvalidRequest, match="a position that is not there"):
        executor.run(inputs, Sequences(**good))


def test_what_pytorchs_devices_have_not() -> None:
    with pytest.raises(InvalidRequest, match="q8_0 is for the device cpu"):
        on_torch(
            attending.attention(16, cached=True), in_memory({}), {"tokens": 8},
            kv_dtype="q8_0",
        )  # fmt: skip
    with pytest.raises(InvalidRequest, match="no value named y"):
        embedding(keep=["y"])
    with pytest.raises(OutOfMemory, match="choose a smaller context"):
        on_torch(
            attending.attention(128, cached=True), in_memory({}), {"tokens": 8},
            blocks=2**34,
        )  # fmt: skip


def test_an_error_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is told that there was none would else hold on to what the step had."""
    executor, held = embedding(), []

    def full(_: Any) -> Any:
        activations = torch.zeros(9)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(executor, "_acted", full)
    inputs = {"tokens": np.array([3], np.int32), "outputs": np.array([0], np.int32)}
    with pytest.raises(OutOfMemory) as error:
        executor.run(inputs)
    assert error.value.__context__
    assert held[0]() is None


# ---- the rest of what executors do ----


def test_kept_values_and_profiles() -> None:
    executor = embedding(keep=["x"])
    with pytest.raises(InvalidRequest, match="after a step"):
        executor.value("x")
    inputs = {"tokens": np.array([3, 8], np.int32), "outputs": np.array([1], np.int32)}
    phases = executor.profile(lambda: [executor.run(inputs) for _ in range(2)])
    assert executor.value("x").tolist() == [[12, 13, 14, 15], [32, 33, 34, 35]]
    assert [phase.name for phase in phases] == ["embed f32 9x4", "gather rows"]
    assert phases[0].bytes == 2 * 2 * 16
    assert all(phase.elapsed_s > 0 for phase in phases)
    assert (executor.weight_bytes, executor.kv_bytes, executor.ids, executor.vocab) == (
        144,
        0,
        9,
        4,
    )
    assert executor.isa.startswith("torch ")
    assert executor.isa.endswith("(f32)")


def test_weights_are_quantized_again(rng: np.random.Generator) -> None:
    b, weights = Builder(), Weights(rng)
    x = b.value("x", 64)
    program = b.build(b.emit(Linear(b.value("out", 37), x, weights.matrix(37, 64))), inputs=(x,))
    inputs = {"x": rng.standard_normal((3, 64), np.float32)}
    executor, checkpoint = on_torch(program, weights.checkpoint(), SPACES), weights.checkpoint()
    before = executor.run(inputs)["out"]
    executor.requantize(Plan.of("q4_0"))
    assert [total.format for total in executor.formats] == ["q4_0"]
    fresh = on_torch(program, checkpoint, SPACES, plan="q4_0")
    assert executor.weight_bytes == fresh.weight_bytes
    after = executor.run(inputs)["out"]
    assert after.tobytes() == fresh.run(inputs)["out"].tobytes()
    assert 0 < relative(after, before) < 0.3
