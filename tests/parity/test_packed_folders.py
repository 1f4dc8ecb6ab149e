"""GPTQ and AWQ folders against transformers with the weights they stand for, in float32."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import packed_folder
import pytest
import tiny
from config_cases import CONFIG_CASES
from harness import BLOCK, BLOCKS, Built, distance, run, run_model
from packed_folder import Packing
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from reference_executor import ReferenceExecutor
from squall.checkpoints import open_checkpoint
from squall.cli.app import app
from squall.decoder import compile
from squall.errors import InvalidCheckpoint, SquallError, UnsupportedModel
from squall.executors.native import NativeExecutor
from squall.quant import Plan
from squall.recipes import load

EXACT, PACKED = 1e-5, 0.05  # the latter: activations of 8 bits
BY_NAME = {case.name: case for case in CONFIG_CASES}
WIDE = {"num_hidden_layers": 2, "intermediate_size": 256}
GPTQ = [
    Packing("gptq", bits, group, act_order, version=1 + (bits + group + act_order) % 2)
    for bits, group, act_order in product((2, 3, 4, 8), (32, 64, 128, -1), (False, True))
]
AWQ = [Packing("awq", 4, group) for group in (32, 64, 128, -1)]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def build(
    name: str, packing: Packing, folder: Path, config: dict[str, Any] = WIDE, head: bool = False
) -> Built:
    case = BY_NAME[name]
    case = tiny.Case(
        name, case.architecture, case.model, case.config | config, context=case.context
    )
    model = tiny.build(case)
    model = packed_folder.save(model, packing, folder / "m", seed=len(str(packing)), head=head)
    return run_model(model, case, open_checkpoint(folder / "m"))


def executor(model: Built, **options: Any) -> NativeExecutor:
    program = compile(model.recipe.decoder, model.recipe.names, context=model.context)
    return NativeExecutor(
        program, model.checkpoint, blocks=BLOCKS, block_size=BLOCK, kv_dtype="f32", threads=1,
        **options,
    )  # fmt: skip


def check(model: Built) -> NativeExecutor:
    exact = run(executor(model, weights="f32"), model.tokens, [13, 27])
    assert distance(exact, model.logits) < EXACT
    packed = executor(model)
    found = run(packed, model.tokens, [13, 27])
    errors = [distance(*rows) for rows in zip(found, model.logits, strict=True)]
    assert np.median(errors) < PACKED  # a row may choose other experts
    alone = run(executor(model), model.tokens, [1] * 40)
    assert alone.tobytes() == found.tobytes()
    return packed


@pytest.mark.parametrize("packing", [*GPTQ, *AWQ], ids=str)
def test_logits(packing: Packing, tmp_path: Path) -> None:
    model = build("llama-2", packing, tmp_path)
    packed = check(model)
    group = 128 if packing.group == -1 else packing.group
    formats = {total.format for total in packed.formats}
    assert f"int{packing.bits}_g{group}" in formats
    assert formats <= {f"int{packing.bits}_g{group}", "f32"}
    program = packed.program
    slow = ReferenceExecutor(program, model.checkpoint, blocks=BLOCKS, block_size=BLOCK)
    assert distance(run(slow, model.tokens, [40]), model.logits) < EXACT


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("qwen2.5", Packing(act_order=True, version=2)),  # biases
        ("qwen2.5", Packing("awq")),
        ("qwen2.5", Packing(act_order=True, shared_order=False)),
        ("qwen2.5", Packing(symmetric=True, bias=True)),
        ("phi-3", Packing(bits=3, group=32, act_order=True)),  # fused names
        ("phi-3", Packing("awq", group=32)),
        ("mixtral-window", Packing("awq", group=64)),
        ("mixtral-window", Packing(act_order=True)),
        ("qwen3-moe", Packing(bits=8, group=32)),
        ("llama-2", Packing(symmetric=True, bias=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [192, 256])
def test_other_models(name: str, packing: Packing, width: int, tmp_path: Path) -> None:
    check(build(name, packing, tmp_path, WIDE | {"intermediate_size": width}))


def test_a_quantized_head(tmp_path: Path) -> None:
    model = build("llama-2", Packing(act_order=True), tmp_path, head=True)
    formats = {total.format: total for total in check(model).formats}
    assert formats["int4_g128"].matrices == 15
