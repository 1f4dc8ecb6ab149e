"""A row's bytes are the same whatever it is computed with: on the device that is asked for.

With SQUALL_TEST_DEVICE a GPU's, in the types that it computes with; otherwise PyTorch's on the CPU.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from formats import random_checkpoint
from random_gguf import SHAPES
from squall import decoder, executors, quant, recipes
from squall.batch import Batch
from squall.executors import Limits, Placement, thread_pool
from squall.executors.devices import Stage, device_name
from squall.weights import WeightStore

pytest.importorskip("torch")
DEVICE = device_name(os.environ.get("SQUALL_TEST_DEVICE") or "torch")
FORMATS = ("bf16", "q4_k", "q6_k", "hqq3")
LENGTHS, BLOCK, BLOCKS = (61, 5, 37), 16, 4
Part = tuple[int, int, int]  # of a sequence, from position to position
Rows = dict[tuple[int, int], bytes]


def opened(format_name: str, device: str, *, exact_weights: bool = False) -> Any:
    """A tiny model in one number format."""
    checkpoint = random_checkpoint(SHAPES["tiny"], format_name, normal=True)
    recipe = recipes.load(checkpoint)
    program = decoder.compile(recipe.decoder, recipe.names, context=BLOCK * BLOCKS)
    limits = Limits(
        rows={"tokens": 128, "outputs": 128}, blocks=BLOCKS * len(LENGTHS), block_size=BLOCK,
        kv_dtype="f16",
    )  # fmt: skip
    store = WeightStore(checkpoint, plan=quant.Plan(), exact=exact_weights)
    placement = Placement((Stage(device),), exact=True)
    return executors.open(program, store, limits, placement=placement, pool=thread_pool(1))


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """A number format, and an executor of a model in it."""
    return request.param, opened(request.param, DEVICE)


@pytest.fixture
def executor(case: tuple[str, Any]) -> Any:
    return case[1]


def run(executor: Any, steps: list[list[Part]]) -> Rows:
    """The logits of every row."""
    tables = np.arange(BLOCKS * len(LENGTHS), dtype=np.int32).reshape(-1, BLOCKS)
    found: Rows = {}
    for parts in steps:
        at = [(s, position) for s, first, last in parts for position in range(first, last)]
        sizes = [last - first for _, first, last in parts]
        logits = executor.step(
            Batch(
                tokens=np.array([(7 * s + 11 * at) % 1000 for s, at in at], np.int32),
                positions=np.array([position for _, position in at], np.int32),
                bounds=np.cumsum([0, *sizes], dtype=np.int32),
                block_tables=tables[[s for s, _, _ in parts]],
                outputs=np.arange(len(at), dtype=np.int32),
            )
        )
        found |= {place: row.tobytes() for place, row in zip(at, logits.copy(), strict=True)}
    return found


def cut(rng: np.random.Generator) -> list[list[Part]]:
    """All sequences side by side, each in pieces of any length, now and then none."""
    done, steps = [0] * len(LENGTHS), []
    while any(d < length for d, length in zip(done, LENGTHS, strict=True)):
        parts: list[Part] = []
        for s in rng.permutation(len(LENGTHS)).tolist():
            size = min(int(rng.choice([0, 1, 1, 2, 7, 16, 17, 33])), LENGTHS[s] - done[s])
            if size:
                parts.append((s, done[s], done[s] + size))
                done[s] += size
        if parts:
            steps.append(parts)
    return steps


def test_rows_do_not_depend_on_their_company(executor: Any, rng: np.random.Generator) -> None:
    alone = run(executor, [[(s, 0, length)] for s, length in enumerate(LENGTHS)])
    assert all(np.isfinite(np.frombuffer(row, np.float32)).all() for row in alone.values())
    token_by_token = [[(0, i, i + 1)] for i in range(LENGTHS[0])]
    for steps in (token_by_token, cut(rng), cut(rng)):
        found = run(executor, steps)
        differing = [place for place, row in found.items() if row != alone[place]]
        assert not differing, (executor.isa, steps, differing)


def test_nor_on_how_often_they_are_asked(executor: Any) -> None:
    """The third time from graphs, where the device has them."""
    step = [[(0, 0, 5), (1, 0, 5), (2, 0, 5)], [(0, 5, 6), (2, 5, 6)]]
    first, *others = (run(executor, step) for _ in range(4))
    assert all(other == first for other in others)


def test_rows_are_right(case: tuple[str, Any]) -> None:
    """Beside the native executor's in float32; a GPU has eight bits of each number."""
    name, executor = case
    steps = [[(s, 0, length) for s, length in enumerate(LENGTHS)]]
    expected, found = (
        np.stack([np.frombuffer(row, np.float32) for row in run(each, steps).values()])
        for each in (opened(name, "cpu", exact_weights=True), executor)
    )
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < (2e-3 if DEVICE in ("cpu", "torch") and name == "bf16" else 3e-2)
