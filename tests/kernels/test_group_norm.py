"""Group norms over all rows: against NumPy, with the same bytes on any number of threads."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from native_executor import in_memory, opened
from reference_executor import ReferenceExecutor
from squall import _native, executors
from squall.checkpoints.base import Checkpoint
from squall.errors import UnsupportedModel
from squall.executors import Limits
from squall.program import Builder, GroupNormalize, Linear, Matrix, Program, Slice, Vector
from squall.spec import Activation
from squall.weights import WeightStore

ROWS = (1, 2, 3, 4, 5, 8, 23, 63, 64, 65, 512)
SPACES = {"tokens": 512}
ISAS = _native.isas()

isas = pytest.mark.parametrize("isa", ISAS)


def norms(width: int, groups: int, activation: Activation | None = "silu") -> Program:
    """Two, each of which needs the sums for itself."""
    b = Builder()
    x = b.value("x", width)
    weight, bias = (Vector((Slice(name, 0, width),), width) for name in ("w", "b"))
    first = b.value("first", width)
    b.emit(GroupNormalize(first, x, weight, bias, groups, 1e-6, activation))
    second = b.value("second", width)
    b.emit(GroupNormalize(second, x, bias, weight, groups, 1e-2))
    return b.build(first, second, inputs=(x,))


def weights(width: int, rng: np.random.Generator) -> Checkpoint:
    return in_memory({name: rng.standard_normal(width, np.float32) for name in ("w", "b")})


@isas
@pytest.mark.parametrize(
    ("width", "groups"),
    [(1, 1), (3, 3), (12, 4), (33, 11), (64, 32), (96, 2), (128, 32), (512, 32)],
)
def test_groups_of_any_width_give_what_numpy_does(
    isa: str, width: int, groups: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)
    program, checkpoint = norms(width, groups), weights(width, rng)
    executor = opened(program, checkpoint, SPACES)
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    for rows in ROWS:
        if rows * width // groups < 8:
            continue  # a variance of next to nothing magnifies any rounding
        inputs = {"x": rng.standard_normal((rows, width), np.float32)}
        found, wanted = executor.run(inputs), reference.run(inputs)
        for name in ("first", "second"):
            np.testing.assert_allclose(
                found[name], wanted[name], rtol=2e-5, atol=2e-5 * np.abs(wanted[name]).max()
            )


def test_values_far_from_zero_lose_nothing(rng: np.random.Generator) -> None:
    """Squares minus the square of the mean would leave no digit."""
    program, checkpoint = norms(64, 4, None), weights(64, rng)
    executor = opened(program, checkpoint, SPACES)
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    x = (3e4 + rng.standard_normal((512, 64))).astype(np.float32)
    found, wanted = (e.run({"x": x})["first"] for e in (executor, reference))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_rows_that_are_alike_give_the_bias(rng: np.random.Generator) -> None:
    program, checkpoint = norms(64, 4, None), weights(64, rng)
    found = opened(program, checkpoint, SPACES).run({"x": np.full((300, 64), 7.0, np.float32)})
    bias = checkpoint.tensors["b"].to_float32()
    np.testing.assert_allclose(found["first"], np.tile(bias, (300, 1)), rtol=0, atol=1e-3)


def test_threads_and_instruction_sets_change_no_bit(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, store = norms(96, 32), WeightStore(weights(96, rng))
    for rows in ROWS:
        inputs: dict[str, Any] = {"x": rng.standard_normal((rows, 96), np.float32)}
        found = set()
        for threads, isa in product((1, 2, 3), ISAS):
            monkeypatch.setenv("SQUALL_ISA", isa)
            pool = executors.thread_pool(threads)
            executor = executors.open(program, store, Limits(rows=SPACES), pool=pool)
            found |= {executor.run(inputs, patient=p)["second"].tobytes() for p in (False, True)}
        assert len(found) == 1, rows


def test_no_rows(rng: np.random.Generator) -> None:
    executor = opened(norms(8, 2), weights(8, rng), SPACES)
    assert executor.run({"x": np.zeros((0, 8), np.float32)})["second"].shape == (0, 8)


def test_an_integer_linear_reads_it(rng: np.random.Generator) -> None:
    b = Builder()
    x, out = b.value("x", 64), b.value("out", 16)
    weight, bias = (Vector((Slice(name, 0, 64),), 64) for name in ("w", "b"))
    norm = b.emit(GroupNormalize(b.value("norm", 64), x, weight, bias, 4, 1e-6, "silu"))
    b.emit(Linear(out, norm, Matrix((Slice("m", 0, 16),), 16, 64, role="m")))
    program = b.build(out, inputs=(x,))
    checkpoint = in_memory(
        {name: rng.standard_normal(64, np.float32) for name in ("w", "b")}
        | {"m": rng.standard_normal((16, 64), np.float32)}
    )
    inputs = {"x": rng.standard_normal((100, 64), np.float32)}
    wanted = ReferenceExecutor(program, checkpoint, blocks=1).run(inputs)["out"]
    found = opened(program, checkpoint, SPACES, plan="q8_0").run(inputs)["out"]
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("groups", [0, 3, 65])
def test_groups_that_do_not_fit_are_refused(groups: int, rng: np.random.Generator) -> None:
    with pytest.raises(UnsupportedModel, match="group norm"):
        opened(norms(64, groups), weights(64, rng), SPACES)
