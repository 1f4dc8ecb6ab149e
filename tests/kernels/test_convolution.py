"""Convolutions: rows that an index names, side by side, times a weight; against NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import linear_reference as reference
import numpy as np
import pytest
from numpy.typing import NDArray

from native_executor import in_memory, opened
from quant.random_blocks import random_blocks
from reference_executor import ReferenceExecutor
from squall import _native, executors
from squall.checkpoints.base import ByteTensor, Checkpoint
from squall.errors import InvalidRequest, UnsupportedModel
from squall.executors import Limits
from squall.program import (
    Builder,
    GroupNormalize,
    Index,
    Linear,
    Matrix,
    Program,
    Slice,
    Vector,
)
from squall.quant import FORMATS, Format
from squall.weights import WeightStore

ROWS = (1, 2, 3, 4, 5, 8, 23, 512)
SPACES = {"tokens": 600, "images": 512}
ISAS = _native.isas()

isas = pytest.mark.parametrize("isa", ISAS)
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)


@dataclass(frozen=True)
class Shape:
    """Of a convolution: columns of x and of the output, and taps."""

    width: int
    outputs: int
    taps: int
    quantized: bool = False

    @property
    def program(self) -> Program:
        """With everything that a linear may have, then one more that reads its output."""
        b = Builder()
        x, rest = b.value("x", self.width), b.value("rest", self.outputs, "images")
        taps = Index("taps", "images", self.taps)
        weight = Matrix((Slice("w", 0, self.outputs),), self.outputs, self.taps * self.width)
        bias = Vector((Slice("b", 0, self.outputs),), self.outputs)
        out = b.value("out", self.outputs, "images")
        b.emit(Linear(out, x, weight, bias, "quick_gelu", 0.5, rest, taps=taps))
        bare = b.value("bare", self.outputs, "images")
        b.emit(Linear(bare, x, weight, taps=taps))
        return b.build(out, bare, inputs=(x, rest))

    def checkpoint(self, format: Format, rng: np.random.Generator) -> Checkpoint:
        shape = (self.outputs, self.taps * self.width)
        data = random_blocks(format, rng, shape[0] * shape[1] // format.block)
        bias = rng.standard_normal(self.outputs, np.float32)
        tensors = {
            "w": ByteTensor("w", format.name, shape, data),
            "b": ByteTensor("b", "f32", bias.shape, bias.view(np.uint8)),
        }
        return Checkpoint(Path(), {}, tensors, 0)

    def inputs(self, rng: np.random.Generator, rows: int) -> dict[str, Any]:
        """The last two rows of the run are far apart; a third of the taps are outside."""
        given = rows + 7
        x = rng.normal(0, 0.005, (given, self.width)).astype(np.float32)  # weights may be large
        x[rng.random(x.shape) < 0.02] *= 20
        near = np.arange(rows) + rng.integers(0, 7, (self.taps, 1))
        taps = np.where(rng.random(near.shape) < 0.3, -rng.integers(1, 9, near.shape), near)
        taps[:, -1] = rng.integers(0, given, self.taps)
        rest = rng.standard_normal((rows, self.outputs), np.float32)
        return {"x": x, "rest": rest, "taps": taps.astype(np.int32)}


def shape_of(format: Format) -> Shape:
    if format.block == 1:
        return Shape(27, 37, 9)
    return Shape(max(64, format.block), 37, 4, quantized=True)


def close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> bool:
    size = np.sqrt(np.mean(np.square(wanted), dtype=np.float64)) + 1e-30
    return bool(np.abs(found - wanted).max(initial=0) <= 2e-5 * size)


def seen(inputs: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """What the kernels see: int8 where the weight is of integers."""
    if not shape.quantized:
        return inputs
    x = inputs["x"]
    groups = reference.quantize_activations(x.reshape(-1, reference.GROUP))
    return inputs | {"x": groups.reshape(x.shape).astype(np.float32)}


@isas
@formats
def test_every_format_gives_what_numpy_does(
    isa: str, format: Format, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)
    shape = shape_of(format)
    checkpoint = shape.checkpoint(format, rng)
    executor = opened(shape.program, checkpoint, SPACES)
    numpy = ReferenceExecutor(shape.program, checkpoint, blocks=1)
    for rows in ROWS:
        inputs = shape.inputs(rng, rows)
        found, wanted = executor.run(inputs), numpy.run(seen(inputs, shape))
        for name in ("out", "bare"):
            assert close(found[name], wanted[name]), (rows, name)


@isas
@pytest.mark.parametrize("name", ["f32", "bf16"])
@pytest.mark.parametrize("width", [1, 3, 16, 27, 130])
def test_odd_widths(
    isa: str, name: str, width: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)
    for outputs, taps in ((3, 9), (16, 1), (530, 2)):
        shape = Shape(width, outputs, taps)
        checkpoint = shape.checkpoint(FORMATS[name], rng)
        executor = opened(shape.program, checkpoint, SPACES)
        numpy = ReferenceExecutor(shape.program, checkpoint, blocks=1)
        for rows in (1, 250):
            inputs = shape.inputs(rng, rows)
            found, wanted = executor.run(inputs), numpy.run(inputs)
            assert close(found["out"], wanted["out"]), (outputs, taps, rows)


@isas
@formats
def test_a_row_has_the_same_bytes_whatever_the_others_and_the_threads(
    isa: str, format: Format, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)
    shape = replace(shape_of(format), outputs=100)
    store = WeightStore(shape.checkpoint(format, rng))
    inputs = shape.inputs(rng, 512)
    wanted = None
    for threads in (1, 3):
        pool = executors.thread_pool(threads)
        executor = executors.open(shape.program, store, Limits(rows=SPACES), pool=pool)
        found = [executor.run(inputs, patient=patient)["out"] for patient in (False, True)]
        wanted = found[0] if wanted is None else wanted
        assert {y.tobytes() for y in found} == {wanted.tobytes()}
        for rows in ROWS[:-1]:
            first = int(rng.integers(0, 513 - rows))
            some = slice(first, first + rows)
            part = inputs | {
                "taps": inputs["taps"][:, some].copy(),
                "rest": inputs["rest"][some],
            }
            assert executor.run(part)["out"].tobytes() == wanted[some].tobytes(), (threads, rows)


@formats
def test_instruction_sets_agree_bit_for_bit(
    format: Format, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(format)
    checkpoint, inputs = shape.checkpoint(format, rng), shape.inputs(rng, 77)
    found = set()
    for isa in ISAS:
        monkeypatch.setenv("SQUALL_ISA", isa)
        found.add(opened(shape.program, checkpoint, SPACES).run(inputs)["bare"].tobytes())
    assert len(found) == 1


def test_no_rows(rng: np.random.Generator) -> None:
    shape = Shape(5, 7, 9)
    executor = opened(shape.program, shape.checkpoint(FORMATS["f32"], rng), SPACES)
    inputs = shape.inputs(rng, 3)
    none = inputs | {"rest": inputs["rest"][:0], "taps": inputs["taps"][:, :0].copy()}
    assert executor.run(none)["out"].shape == (0, 7)
    nothing = inputs | {"x": inputs["x"][:0], "taps": np.full_like(inputs["taps"], -1)}
    assert not executor.run(nothing)["bare"].any()


@pytest.mark.parametrize("value", [10, 11, 600, 2**31 - 1])
def test_rows_that_are_not_there_are_refused(value: int, rng: np.random.Generator) -> None:
    shape = Shape(5, 7, 9)
    executor = opened(shape.program, shape.checkpoint(FORMATS["f32"], rng), SPACES)
    inputs = shape.inputs(rng, 3)
    inputs["taps"].flat[0] = -(2**31)  # any negative number means zeros
    inputs["taps"].flat[-1] = 9
    executor.run(inputs)
    inputs["taps"].flat[-1] = value
    with pytest.raises(InvalidRequest, match="a chosen row is outside"):
        executor.run(inputs)
    with pytest.raises(InvalidRequest):
        executor.run(inputs | {"taps": inputs["taps"][:-1].copy()})


@pytest.mark.parametrize(
    ("width", "taps", "cols", "space", "why"),
    [
        (32, 9, 32 * 8, "images", "columns of its taps"),
        (32, 9, 32 * 9 * 2, "images", "columns of its taps"),
        (32, 9, 32 * 9, "tokens", "of other rows"),
        (16, 8, 16 * 8, "images", "multiples of 32"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    width: int, taps: int, cols: int, space: str, why: str
) -> None:
    b = Builder()
    x, out, index = b.value("x", width), b.value("out", 4, "images"), Index("taps", space, taps)
    b.emit(Linear(out, x, Matrix((Slice("w", 0, 4),), 4, cols), taps=index))
    data = np.zeros(4 * cols // 32 * FORMATS["q8_0"].block_bytes, np.uint8)
    checkpoint = Checkpoint(Path(), {}, {"w": ByteTensor("w", "q8_0", (4, cols), data)}, 0)
    with pytest.raises(UnsupportedModel, match=why):
        opened(b.build(out, inputs=(x,)), checkpoint, SPACES)


def test_the_profile_tells_the_work(rng: np.random.Generator) -> None:
    for format, kind in (("f16", "fmas"), ("q8_0", "dots")):
        shape = Shape(32, 48, 9)
        executor = opened(shape.program, shape.checkpoint(FORMATS[format], rng), SPACES)
        inputs = shape.inputs(rng, 100)
        phases = executor.profile(lambda: executor.run(inputs))  # noqa: B023
        found = [p for p in phases if p.name == f"convolution {format} 48x288"]
        assert len(found) == 2
        assert getattr(found[0], kind) == 100 * 48 * 288
        assert found[0].bytes >= 48 * 288


def test_residual_blocks_need_three_maps(rng: np.random.Generator) -> None:
    """Sums lie over what they add to, norms over what nobody else reads."""
    width, rows, b = 32, 512, Builder()
    x, taps = b.value("x", width), Index("taps", axes=9)
    matrix = Matrix((Slice("w", 0, width),), width, 9 * width)
    vector = Vector((Slice("b", 0, width),), width)
    last = b.emit(Linear(b.value("first", width), x, matrix, taps=taps))
    for block in range(3):
        inner = last
        for half, residual in enumerate((None, last)):
            norm, out = (b.value(f"{block}.{half}.{name}", width) for name in ("norm", "out"))
            b.emit(GroupNormalize(norm, inner, vector, vector, 4, 1e-6, "silu"))
            inner = b.emit(Linear(out, norm, matrix, residual=residual, taps=taps))
        last = inner
    program = b.build(last, inputs=(x,))
    weights = {
        "w": rng.normal(0, 0.1, (width, 9 * width)).astype(np.float32),
        "b": rng.standard_normal(width, np.float32),
    }
    checkpoint = in_memory(weights)
    executor = opened(program, checkpoint, {"tokens": rows})
    assert executor._native.buffer_bytes < 3.1 * rows * width * 4
    inputs = {
        "x": rng.standard_normal((rows, width), np.float32),
        "taps": rng.integers(-1, rows, (9, rows)).astype(np.int32),
    }
    wanted = ReferenceExecutor(program, checkpoint, blocks=1).run(inputs)
    assert close(executor.run(inputs)[last.name], wanted[last.name])
