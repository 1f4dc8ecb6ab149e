"""Every architecture against transformers in float32, through a GGUF file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from harness import Build, MakeExecutor, distance, make_batch, run
from tiny import CASES, CONTEXT, Case

from squall.decoder import compile
from squall.program import Program
from squall.recipes.gguf import RECIPES

TOLERANCE = 1e-5
STEPS = {"at once": [40], "in chunks": [13, 1, 5, 21], "token by token": [20, *[1] * 20]}
BY_NAME = {case.name: case for case in CASES}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def program_of(build: Build, case: Case) -> Program:
    recipe = build(case).recipe
    return compile(recipe.decoder, recipe.names, context=CONTEXT)


def test_every_architecture_has_a_case() -> None:
    seen = {"qwen2vl"}  # with its tower, in tests/vision
    assert {case.architecture for case in CASES} | seen == set(RECIPES)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_transformers(
    case: Case, steps: list[int], built: Build, make_executor: MakeExecutor
) -> None:
    model = built(case)
    executor = make_executor(program_of(built, case), model.checkpoint)
    assert distance(run(executor, model.tokens, steps), model.logits) < TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_sequences_of_one_step_do_not_meet(
    name: str, built: Build, make_executor: MakeExecutor
) -> None:
    model = built(BY_NAME[name])
    executor = make_executor(program_of(built, BY_NAME[name]), model.checkpoint)
    other = model.tokens[::-1]
    executor.step(make_batch([(other[:9], 0, 1)]))
    executor.step(make_batch([(model.tokens[:20], 0, 0), (other[9:21], 9, 1)]))
    found = executor.step(make_batch([(other[21:], 21, 1), (model.tokens[20:], 20, 0)]))
    assert distance(found[-20:], model.logits[20:]) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi2"])
def test_every_layer_equals_transformers(
    name: str, built: Build, make_executor: MakeExecutor
) -> None:
    model = built(BY_NAME[name])
    layers = len(model.recipe.decoder.layers)
    names = ["embed", *(f"layers.{index}" for index in range(layers - 1))]
    executor = make_executor(program_of(built, BY_NAME[name]), model.checkpoint, [*names, "norm"])
    run(executor, model.tokens, [len(model.tokens)])
    # The last hidden state of transformers is the normalized one.
    for value, wanted in zip([*names, "norm"], model.hidden, strict=True):
        assert distance(executor.value(value), wanted) < TOLERANCE, value


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_wanted_rows_have_logits(
    case: Case, built: Build, make_executor: MakeExecutor
) -> None:
    """Also in a step that wants none, and rows out of order."""
    model = built(case)
    executor = make_executor(program_of(built, case), model.checkpoint)
    first = replace(make_batch([(model.tokens[:20], 0, 0)]), outputs=np.empty(0, np.int32))
    assert len(executor.step(first)) == 0
    wanted = np.array([17, 3, 19], np.int32)
    found = executor.step(replace(make_batch([(model.tokens[20:], 20, 0)]), outputs=wanted))
    assert distance(found, model.logits[20 + wanted]) < TOLERANCE
