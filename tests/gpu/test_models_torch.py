"""Whole models by PyTorch: every number format, and what is opened with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import squall
from harness import run
from test_mixed_formats import in_formats
from tiny_models import write_folder, write_gguf

from formats import random_checkpoint
from gpu.on_torch import TORCH
from random_gguf import Shape, matrices
from reference_executor import ReferenceExecutor
from squall import Model, convert, decoder, executors, recipes
from squall.checkpoints import open_checkpoint
from squall.checkpoints.base import Checkpoint
from squall.executors import Limits
from squall.quant import FORMATS, Plan
from squall.weights import WeightStore

SHAPE = Shape(2, 256, 512, 4, 2, 400)
TOKENS = [(7 * i) % 400 for i in range(40)]


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    return random_checkpoint(SHAPE, "f32", normal=True)


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith("int")])
def test_every_format(name: str, base: Checkpoint) -> None:
    """Those of GPTQ and AWQ: tests/parity/test_packed_folders.py."""
    checkpoint = in_formats(base, {matrix: name for matrix, *_ in matrices(SHAPE)})
    recipe = recipes.load(checkpoint)
    program = decoder.compile(recipe.decoder, recipe.names, context=64)
    limits = Limits(rows={"tokens": 64, "outputs": 64}, blocks=16, kv_dtype="f32")
    store = WeightStore(checkpoint)
    found = run(executors.open(program, store, limits, placement=TORCH), TOKENS, [13, 1, 26])
    wanted = run(ReferenceExecutor(program, checkpoint, blocks=16, block_size=16), TOKENS, [40])
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    return write_folder(path, hidden_size=256, intermediate_size=256)


def torched(path: Path, **options: Any) -> Model:
    return Model.open(path, device="torch", context=128, threads=1, **options)


def test_quantized_at_load_or_in_a_file(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    written = tmp_path / "q4_k.gguf"
    convert.write(checkpoint, recipes.load(checkpoint), Plan.of("q4_k"), written, threads=1)
    with torched(folder, isq="Q4K") as model, torched(written) as same:
        assert "q4_k" in {total.format for total in model.executor.formats}
        found = model.logits(TOKENS[:20])
        # The file has the rows of heads in another order.
        assert np.abs(same.logits(TOKENS[:20]) - found).max() < 1e-4 * np.abs(found).max()
        model.re_isq("Q8_0")
        assert "q8_0" in {total.format for total in model.executor.formats}
        assert 0 < np.abs(model.logits(TOKENS[:20]) - found).max() < 0.2 * np.abs(found).max()


def test_the_command(folder: Path, tmp_path: Path) -> None:
    path, question = write_gguf(tmp_path / "a.gguf", folder), "Hi"
    with torched(path) as model:
        assert model.executor.isa.startswith("torch ")
        wanted = model.generate(
            [{"role": "user", "content": question}], temperature=0, max_tokens=9
        )
        text = "".join(piece.text for piece in wanted)
    options = ("--device", "torch", "--temperature", "0", "--max-tokens", "9", "--context", "128")
    done = squall("run", "-m", str(path), *options, question)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == text.strip()
