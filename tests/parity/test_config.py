"""Every architecture of config.json against transformers in float32, through saved folders."""

from __future__ import annotations

import numpy as np
import pytest
from config_cases import CONFIG_CASES
from harness import Build, MakeExecutor, distance, run
from tiny import Case

from squall.decoder import compile
from squall.executors.native import NativeExecutor
from squall.recipes.config import RECIPES, SEERS

TOLERANCE = 1e-5
STEPS = {"at once": [40], "in chunks": [13, 1, 5, 21], "token by token": [1] * 40}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_every_architecture_has_a_case() -> None:
    # One name of each function: others are the same model by another name, or part of another.
    functions = {name: entry.function for name, entry in RECIPES.items()}
    seen = functions.keys() & SEERS.keys()  # with their towers, in tests/vision
    tested = {functions[name] for name in seen.union(case.model for case in CONFIG_CASES)}
    assert tested == set(functions.values())


@pytest.mark.parametrize("case", CONFIG_CASES, ids=str)
def test_logits_equal_transformers(
    case: Case, built_folder: Build, make_executor: MakeExecutor
) -> None:
    model = built_folder(case)
    assert len(model.checkpoint.parts) > 1
    program = compile(model.recipe.decoder, model.recipe.names, context=model.context)
    executor = make_executor(program, model.checkpoint)
    found = {name: run(executor, model.tokens, steps) for name, steps in STEPS.items()}
    for name, logits in found.items():
        assert distance(logits, model.logits) < TOLERANCE, name
        if isinstance(executor, NativeExecutor):
            np.testing.assert_array_equal(logits, found["at once"], name)
