"""Rows that one row modulates, rows after rows, attention by distance; as in models of pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from native_executor import in_memory, opened
from reference_executor import ReferenceExecutor
from spans import any_spans
from squall import _native, executors
from squall.errors import InvalidRequest, UnsupportedModel
from squall.executors import Limits
from squall.program import (
    Add,
    Attend,
    Builder,
    CacheLayer,
    ConcatenateRows,
    Index,
    Linear,
    Matrix,
    Modulate,
    Program,
    RopeAngles,
    Slice,
    Value,
    Vector,
)
from squall.quant import Plan
from squall.spec import Activation
from squall.weights import WeightStore

Array = NDArray[np.float32]
ROWS = (0, 1, 2, 3, 4, 5, 8, 23, 512)
SPACES = {"tokens": 512, "text": 64, "all": 576, "one": 1}
ACTIVATIONS: tuple[Activation | None, ...] = (
    None, "silu", "gelu", "gelu_tanh", "quick_gelu", "relu",
)  # fmt: skip
WIDTHS = (1, 7, 33, 64)
HEADS, DISTANCES = 4, 9

isas = pytest.mark.parametrize("isa", _native.isas())


@pytest.fixture
def on(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)


def linear(b: Builder, x: Value, outs: int = 19) -> Value:
    weight = Matrix((Slice("w", 0, outs),), outs, x.width, role="w")
    return b.emit(Linear(b.value(f"of {x.name}", outs, x.rows), x, weight))


def modulated(width: int, *, quantized: bool = False) -> Program:
    """Every activation of a sum, gated and not; a modulation; and all after rows of another space.

    quantized: what linears make of them, which read them as int8.
    """
    b = Builder()
    x, y, by = b.value("x", width), b.value("y", width), b.value("by", 3 * width + 2, "one")
    text = b.value("text", width, "text")
    outs = []
    for activation in ACTIVATIONS:
        for column in (None, 0, 2 * width + 2):
            out = b.value(f"{activation} {column}", width)
            gate = {} if column is None else {"gate": by, "column": column}
            outs.append(b.emit(Add(out, x, y, 0.7, activation=activation, **gate)))
    outs.append(b.emit(Modulate(b.value("modulated", width), x, by, width + 1, 1, 1e-6)))
    first = ConcatenateRows(b.value("first", width, "all"), text, outs[-1])
    outs += [b.emit(first), b.emit(ConcatenateRows(b.value("last", width, "all"), y, text))]
    turned = RopeAngles(b.value("angles", 2, "all"), Index("all", "all"), (1.0,))
    outs = [*(linear(b, out) if quantized else out for out in outs), b.emit(turned)]
    return b.build(*outs, inputs=(x, y, by, text))


def given(rng: np.random.Generator, rows: int, text: int, width: int) -> dict[str, Any]:
    sizes = {"x": (rows, width), "y": (rows, width), "by": (1, 3 * width + 2)}
    floats = {
        name: rng.normal(0.2, 1.5, size).astype(np.float32)
        for name, size in (sizes | {"text": (text, width)}).items()
    }
    floats["x"] += np.arange(width, dtype=np.float32) % 2 * 9  # no two columns are nearly equal
    return floats | {"all": np.arange(rows + text, dtype=np.int32)}


@pytest.mark.usefixtures("on")
@isas
@pytest.mark.parametrize(
    ("width", "quantized"), [*((width, False) for width in WIDTHS), (32, True), (224, True)]
)
def test_rows_are_modulated(width: int, quantized: bool, rng: np.random.Generator) -> None:
    program = modulated(width, quantized=quantized)
    weights = {"w": rng.normal(0, width**-0.5, (19, width)).astype(np.float32)}
    checkpoint = in_memory(weights if quantized else {})
    executor = opened(program, checkpoint, SPACES, plan="q8_0" if quantized else None)
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    for rows, text in zip(ROWS, (5, 0, 1, 2, 64, 3, 7, 9, 64), strict=True):
        inputs = given(rng, rows, text, width)
        found, wanted = executor.run(inputs), reference.run(inputs)
        for name, out in found.items():
            scale = max(1, np.abs(wanted[name]).max(initial=0))
            error = np.abs(out - wanted[name]).max(initial=0) / scale
            assert error < (0.03 if quantized and name != "angles" else 1e-5), (name, rows)
        for row in {0, rows // 2, rows - 1} if rows else ():
            one = {name: inputs[name][[row]] for name in "xy"}
            alone = executor.run(inputs | one | {"all": inputs["all"][: text + 1]})
            for value in program.outputs:
                if value.rows == "tokens":
                    assert alone[value.name].tobytes() == found[value.name][row].tobytes()


@pytest.mark.parametrize("quantized", [False, True])
def test_threads_and_patience_change_no_byte(quantized: bool, rng: np.random.Generator) -> None:
    width = 96
    program = modulated(width, quantized=quantized)
    store = WeightStore(
        in_memory({"w": rng.normal(0, 0.1, (19, width)).astype(np.float32)}), plan=Plan.of("q8_0")
    )
    inputs = given(rng, 77, 5, width)
    runs = [
        executors.open(
            program, store, Limits(rows=SPACES), pool=executors.thread_pool(threads)
        ).run(inputs, patient=patient)
        for threads in (1, 2, 5)
        for patient in (False, True)
    ]
    for name, out in runs[0].items():
        assert {run[name].tobytes() for run in runs} == {out.tobytes()}


def test_rows_that_do_not_add_up_are_refused(rng: np.random.Generator) -> None:
    executor = opened(modulated(4), in_memory({}), SPACES | {"one": 3})
    inputs = given(rng, 5, 2, 4)
    for count in (6, 8):
        with pytest.raises(InvalidRequest, match="as many as there are of both"):
            executor.run(inputs | {"all": np.arange(count, dtype=np.int32)})
    for count in (0, 2):
        with pytest.raises(InvalidRequest, match="has one row"):
            executor.run(inputs | {"by": np.ones((count, 14), np.float32)})


WRONG = ("gate", "before", "shift", "scale", "rows", "modulated", "width")


def wrong(name: str) -> Program:
    """An op whose sizes do not fit each other."""
    b = Builder()
    x, text, by = b.value("x", 4), b.value("text", 4, "text"), b.value("by", 9, "one")
    out, both = b.value("out", 4), b.value("both", 5, "all")
    ops = {
        "gate": Add(out, x, x, gate=by, column=6),
        "before": Add(out, x, x, gate=by, column=-1),
        "shift": Modulate(out, x, by, 6, 0, 1e-6),
        "scale": Modulate(out, x, by, 0, 1 << 62, 1e-6),
        "rows": Add(out, x, text),
        "modulated": Modulate(out, text, by, 0, 4, 1e-6),
        "width": ConcatenateRows(both, x, text),
    }
    return b.build(b.emit(ops[name]), inputs=(x, text, by))


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises((UnsupportedModel, TypeError)):
        opened(wrong(name), in_memory({}), SPACES)


# ---- attention by distance ----


def by_distance(  # noqa: PLR0913
    dim: int, reach: int, *, keys: str = "tokens", softcap: float | None = None,
    window: int | None = None, cached: bool = False, buckets: tuple[int, ...] | None = None,
) -> Program:  # fmt: skip
    b = Builder()
    q = b.value("q", HEADS * dim)
    k, v = (b.value(name, HEADS // 2 * dim, keys) for name in "kv")
    buckets = tuple(i * 7 % DISTANCES for i in range(2 * reach + 1)) if buckets is None else buckets
    relative = Vector((Slice("relative", 0, DISTANCES * HEADS),), DISTANCES * HEADS)
    op = Attend(
        b.value("out", q.width), q, k, v, Index("spans", axes=2), 0 if cached else None,
        HEADS, HEADS // 2, dim, 0.7, window, softcap, relative, buckets,
    )  # fmt: skip
    caches = (CacheLayer(HEADS // 2, dim),) if cached else ()
    return b.build(b.emit(op), inputs=(q, k, v), caches=caches, context=640)


def distances(rng: np.random.Generator) -> dict[str, Array]:
    return {"relative": rng.normal(0, 2, (DISTANCES, HEADS)).astype(np.float32)}


def queries(rng: np.random.Generator, dim: int, rows: int, keys: int) -> dict[str, Any]:
    sizes = {"q": (rows, HEADS), "k": (keys, HEADS // 2), "v": (keys, HEADS // 2)}
    floats = {
        name: rng.standard_normal((rows, heads * dim), np.float32)
        for name, (rows, heads) in sizes.items()
    }
    return floats | {"spans": any_spans(rng, rows, keys)}


@pytest.mark.usefixtures("on")
@isas
@pytest.mark.parametrize("dim", [1, 17, 64])
@pytest.mark.parametrize(
    ("reach", "softcap"), [(0, 5.0), (1, None), (20, 5.0), (20, None), (128, 5.0), (700, None)]
)
def test_what_rows_see_depends_on_how_far_away_it_is(
    dim: int, reach: int, softcap: float | None, rng: np.random.Generator
) -> None:
    """Of fewer distances than there are positions, and of more."""
    program = by_distance(dim, reach, keys="text", softcap=softcap)
    checkpoint = in_memory(distances(rng))
    executor = opened(program, checkpoint, {"tokens": 512, "text": 600})
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    sizes = ((0, 5), (1, 1), (2, 300), (3, 0), (4, 17), (5, 64), (8, 65), (23, 577), (512, 512))
    for rows, keys in sizes:
        inputs = queries(rng, dim, rows, keys)
        found, wanted = executor.run(inputs)["out"], reference.run(inputs)["out"]
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=f"{rows} of {keys}")


@pytest.mark.usefixtures("on")
@isas
@pytest.mark.parametrize("quantized", [False, True])
def test_distances_are_the_same_in_every_run(quantized: bool, rng: np.random.Generator) -> None:
    """Whatever the threads, and with fewer rows after them; a window only hides."""
    dim = 32
    program, values = by_distance(dim, 40, window=99 if quantized else None), distances(rng)
    b = Builder()
    b.values, b.ops = list(program.values), list(program.ops)
    out = linear(b, program.outputs[0]) if quantized else program.outputs[0]
    program = b.build(out, inputs=program.inputs)
    values["w"] = rng.normal(0, 0.1, (19, HEADS * dim)).astype(np.float32)
    checkpoint = in_memory(values)
    store = WeightStore(checkpoint, plan=Plan.of("q8_0") if quantized else None)
    inputs = queries(rng, dim, 300, 300)
    opened = [
        executors.open(
            program, store, Limits(rows={"tokens": 512}), pool=executors.thread_pool(threads)
        )
        for threads in (1, 2, 5)
    ]
    runs = [e.run(inputs, patient=patient)[out.name] for e in opened for patient in (False, True)]
    wanted = ReferenceExecutor(program, checkpoint, blocks=1).run(inputs)[out.name]
    error = np.abs(runs[0] - wanted).max() / max(1, np.abs(wanted).max())
    assert error < (0.03 if quantized else 2e-5)
    assert {run.tobytes() for run in runs} == {runs[0].tobytes()}
    inputs["spans"] = np.minimum(inputs["spans"], 40)
    whole = opened[0].run(inputs)[out.name]
    for rows in (40, 41, 130):
        few = {name: inputs[name][:rows] for name in "qkv"}
        few["spans"] = inputs["spans"][:, :rows].copy()
        assert opened[1].run(few)[out.name].tobytes() == whole[:rows].tobytes()


MISMEASURED: tuple[dict[str, Any], ...] = (
    {"cached": True}, {"buckets": ()}, {"buckets": (0, 1)}, {"buckets": (0, DISTANCES, 1)},
)  # fmt: skip


@pytest.mark.parametrize("given", MISMEASURED)
def test_distances_that_are_not_there_are_refused(
    given: dict[str, Any], rng: np.random.Generator
) -> None:
    with pytest.raises(UnsupportedModel, match="relative"):
        opened(by_distance(4, 1, **given), in_memory(distances(rng)), {"tokens": 64})
