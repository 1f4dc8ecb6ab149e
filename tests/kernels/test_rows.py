"""Rows chosen, laid over others and activated, on every instruction set, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from native_executor import in_memory, opened
from reference_executor import ReferenceExecutor
from squall import _native
from squall.errors import InvalidRequest
from squall.program import (
    Builder,
    Concatenate,
    GatherRows,
    Index,
    Linear,
    Matrix,
    Overlay,
    Program,
    Slice,
)

ROWS = (0, 1, 2, 3, 5, 23, 512)
WIDTHS = (1, 7, 33, 64)
SPACES = {"tokens": 512, "images": 512}

isas = pytest.mark.parametrize("isa", _native.isas())


def index(rng: np.random.Generator, low: int, high: int, *shape: int) -> NDArray[np.int32]:
    return rng.integers(low, high, shape).astype(np.int32)


def placed(width: int) -> Program:
    """Rows of images over rows of tokens, and neighbours of both side by side and their mean."""
    b = Builder()
    x, rows = b.value("x", width), b.value("rows", width, "images")
    overlaid = b.emit(Overlay(b.value("overlaid", width), x, rows, Index("place")))
    near = Index("near", "images", 3)
    beside = b.emit(GatherRows(b.value("beside", 3 * width, "images"), overlaid, near))
    mean = b.emit(GatherRows(b.value("mean", width, "images"), overlaid, near, mean=True))
    joined = b.emit(Concatenate(b.value("joined", 4 * width, "images"), beside, rows))
    return b.build(overlaid, beside, mean, joined, inputs=(x, rows))


def given(rng: np.random.Generator, tokens: int, images: int, width: int) -> dict[str, Any]:
    return {
        "x": rng.standard_normal((tokens, width), np.float32),
        "rows": rng.standard_normal((images, width), np.float32),
        "place": index(rng, -2 if images else -9, images, tokens),
        "near": index(rng, 0, max(tokens, 1), 3, images if tokens else 0),
    }


@isas
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_lie_over_others_and_side_by_side(
    isa: str, width: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)
    program, checkpoint = placed(width), in_memory({})
    executor = opened(program, checkpoint, SPACES)
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    for tokens, images in zip(ROWS, (0, 0, 5, 1, 512, 3, 23), strict=True):
        inputs = given(rng, tokens, images if tokens else 0, width)
        found, wanted = executor.run(inputs), reference.run(inputs)
        for name in ("overlaid", "beside", "joined"):
            assert found[name].tobytes() == wanted[name].tobytes(), (name, tokens, images)
        np.testing.assert_allclose(found["mean"], wanted["mean"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("place", 3), ("place", 2**31 - 1), ("near", -1), ("near", 5), ("near", -(2**31))],
)
def test_indices_outside_are_refused(name: str, value: int, rng: np.random.Generator) -> None:
    executor = opened(placed(4), in_memory({}), SPACES)
    inputs = given(rng, 5, 3, 4)
    inputs["place"][2] = -(2**31)  # any negative number means none
    executor.run(inputs)
    inputs[name].flat[-1] = value
    with pytest.raises(InvalidRequest, match="a chosen row is outside"):
        executor.run(inputs)


def test_an_index_that_may_choose_none_gathers_nothing() -> None:
    b, place = Builder(), Index("place")
    x, rows = b.value("x", 4), b.value("rows", 4)
    overlaid = b.emit(Overlay(b.value("overlaid", 4), x, rows, place))
    gathered = b.emit(GatherRows(b.value("gathered", 4), x, place))
    with pytest.raises(Exception, match="choose none and some"):
        opened(b.build(overlaid, gathered, inputs=(x, rows)), in_memory({}), SPACES)


@isas
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("quantized", [False, True])
def test_quick_gelu_of_rows_that_were_gathered(
    isa: str,
    width: int,
    quantized: bool,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connector: four neighbours side by side, a linear and its activation."""
    monkeypatch.setenv("SQUALL_ISA", isa)
    width = 32 * width if quantized else width
    b, near = Builder(), Index("near", "images", 4)
    x = b.value("x", width)
    beside = b.emit(GatherRows(b.value("beside", 4 * width, "images"), x, near))
    weight = Matrix((Slice("w", 0, 19),), 19, 4 * width, role="w")
    out = b.value("out", 19, "images")
    program = b.build(b.emit(Linear(out, beside, weight, None, "quick_gelu")), inputs=(x,))
    weights = {"w": rng.normal(0, 4 / width**0.5, (19, 4 * width)).astype(np.float32)}
    checkpoint = in_memory(weights)
    executor = opened(program, checkpoint, SPACES, plan="q8_0" if quantized else None)
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    for rows in ROWS:
        inputs = {
            "x": rng.standard_normal((max(rows, 1), width), np.float32),
            "near": index(rng, 0, max(rows, 1), 4, rows),
        }
        found, wanted = executor.run(inputs)["out"], reference.run(inputs)["out"]
        error = np.abs(found - wanted).max(initial=0) / max(1, np.abs(wanted).max(initial=0))
        assert error < (0.03 if quantized else 1e-5), rows
        for row in {0, rows // 2, rows - 1} if rows else ():
            alone = {"x": inputs["x"], "near": inputs["near"][:, row : row + 1].copy()}
            assert executor.run(alone)["out"].tobytes() == found[row].tobytes()
