"""Models quantized to UQFF and read again, against the same models quantized while they load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_cases import CONFIG_CASES
from harness import BLOCK, BLOCKS, Build, Built, run
from safetensors.numpy import load_file

from squall import convert, decoder, recipes
from squall.checkpoints import Checkpoint, open_checkpoint
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.executors.native import NativeExecutor
from squall.quant import Plan, Topology

CASES = {case.name: case for case in CONFIG_CASES}


def logits(built: Built, checkpoint: Checkpoint, plan: Plan | None = None) -> Any:
    recipe = recipes.load(checkpoint)
    program = decoder.compile(recipe.decoder, recipe.names, context=built.context)
    executor = NativeExecutor(
        program, checkpoint, plan=plan, blocks=BLOCKS, block_size=BLOCK, threads=1
    )
    return run(executor, built.tokens, [len(built.tokens)])


def write(built: Built, path: Path, plan: Plan, **options: Any) -> Checkpoint:
    convert.write_uqff(built.checkpoint, built.recipe, plan, path, **options)
    return open_checkpoint(path)


@pytest.mark.parametrize("case", CONFIG_CASES, ids=str)
def test_every_architecture(case: Any, built_folder: Build, tmp_path: Path) -> None:
    built, plan = built_folder(case), Plan.of("q8_0")
    read = write(built, tmp_path / "m.uqff", plan)
    np.testing.assert_array_equal(logits(built, read), logits(built, built.checkpoint, plan))


@pytest.mark.parametrize("isq", ["q4_0", "q5_1", "q8_1", "q2k", "hqq1", "hqq2", "hqq3", "hqq4"])
def test_every_format(isq: str, built_folder: Build, tmp_path: Path) -> None:
    built, plan = built_folder(CASES["llama-all-biased"]), Plan.of(isq)
    read = write(built, tmp_path / "m.uqff", plan)
    np.testing.assert_array_equal(logits(built, read), logits(built, built.checkpoint, plan))
