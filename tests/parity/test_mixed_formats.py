"""Weights of one op that differ in number format, and of one model, against NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from config_cases import CONFIG_CASES
from harness import Build, run
from tiny import CASES

from native_executor import native
from reference_executor import ReferenceExecutor
from squall import decoder, recipes
from squall.checkpoints import Checkpoint
from squall.checkpoints.base import ByteTensor
from squall.quant import FORMATS

BY_NAME = {case.name: case for case in [*CONFIG_CASES, *CASES]}
# What rounding activations to 8 bits does to the logits of most rows of these models; in some it
# chooses another expert. Other weights are 20 times as far away.
CLOSE = 0.03


def in_formats(checkpoint: Checkpoint, formats: dict[str, str]) -> Checkpoint:
    """The tensors whose names contain a key, in its format."""
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        for part, format in formats.items():
            if part in name:
                data = FORMATS[format].quantize(tensor.to_float32().reshape(-1))
                tensors[name] = ByteTensor(name, format, tensor.shape, data)
    return replace(checkpoint, tensors=tensors)


def executors(checkpoint: Checkpoint, context: int) -> tuple[Any, Any]:
    recipe = recipes.load(checkpoint)
    program = decoder.compile(recipe.decoder, recipe.names, context=context)
    options: dict[str, Any] = {"blocks": 16, "block_size": 16}
    packed = native(program, checkpoint, kv_dtype="f32", threads=2, **options)
    return packed, ReferenceExecutor(program, checkpoint, **options)


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        # Of one op the gate in integers, up in floats; down in either.
        ("mixtral", {"ffn_gate_exps": "q8_0", "ffn_down_exps": "f16"}),
        ("mixtral", {"ffn_up_exps": "q5_1", "ffn_down_exps": "q8_0"}),
        ("qwen3moe", {"ffn_down_exps": "f8_e4m3", "ffn_up_exps": "hqq8"}),
        ("llama-llama3", {"ffn_gate": "bf16", "ffn_up": "q8_0"}),
        ("llama-llama3", {"attn_q": "q8_0", "attn_v": "f16", "ffn_up": "f16", "ffn_gate": "q8_1"}),
        # Experts of one tensor each.
        ("mixtral-single", {"ffn_gate.1.": "q8_0", "ffn_up.2.": "f16", "ffn_down.0.": "q5_1"}),
    ],
)
def test_one_op(name: str, formats: dict[str, str], built: Build) -> None:
    model = built(BY_NAME[name])
    checkpoint = in_formats(model.checkpoint, formats)
    native, reference = executors(checkpoint, model.context)
    assert {"f32", *formats.values()} == {total.format for total in native.formats}
    whole = run(native, model.tokens, [len(model.tokens)])
    wanted = run(reference, model.tokens, [len(model.tokens)])
    apart = np.abs(whole - wanted).max(axis=1) / np.abs(wanted).max()
    assert np.quantile(apart, 0.8) < CLOSE
    steps = [1, 7, 16, len(model.tokens) - 24]
    np.testing.assert_array_equal(run(native, model.tokens, steps, sequence=1), whole)


def test_experts_keep_their_own_formats(built: Build) -> None:
    """Not that of the first, which may hold less."""
    model = built(BY_NAME["mixtral-single"])
    checkpoint = in_formats(model.checkpoint, {"ffn_gate.0.": "q4_0"})
    native, _ = executors(checkpoint, model.context)
    experts = model.recipe.decoder.layers[0].feed_forward.experts  # type: ignore[union-attr]
    parameters = {total.format: total.parameters for total in native.formats}
    gate = checkpoint.tensors["blk.0.ffn_gate.0.weight"]
    assert parameters["q4_0"] == len(model.recipe.decoder.layers) * gate.rows * gate.cols
    assert experts == 6
