"""A folder of float weights, quantized while it is read, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from native_executor import native
from squall import convert, decoder, recipes
from squall.batch import Batch
from squall.checkpoints import Checkpoint, open_checkpoint
from squall.cli.app import app
from squall.executors.native import NativeExecutor
from squall.quant import FORMATS, Plan, Topology

TOKENS = list(range(3, 35))


def model_in(folder: Path, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=160, hidden_size=256, intermediate_size=320, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def quantized(weight: torch.Tensor, format: str) -> torch.Tensor:
    values = weight.detach().numpy()
    if format == "f8_e4m3":
        factor = np.abs(values).max(axis=1, keepdims=True) / np.float32(448)
        codes = FORMATS[format].quantize((values / factor).reshape(-1))
        return torch.from_numpy(FORMATS[format].dequantize(codes).reshape(values.shape) * factor)
    blocks = FORMATS[format].quantize(values.reshape(-1))
    return torch.from_numpy(FORMATS[format].dequantize(blocks).reshape(values.shape))


def opened(checkpoint: Checkpoint, **options: Any) -> NativeExecutor:
    recipe = recipes.load(checkpoint)
    program = decoder.compile(recipe.decoder, recipe.names, context=64)
    return native(program, checkpoint, blocks=4, kv_dtype="f32", **options)


def step(executor: NativeExecutor) -> NDArray[np.float32]:
    rows = np.arange(len(TOKENS), dtype=np.int32)
    return executor.step(
        Batch(
            tokens=np.array(TOKENS, np.int32),
            positions=rows,
            bounds=np.array([0, len(rows)], np.int32),
            block_tables=np.arange(2, dtype=np.int32)[None],
            outputs=rows,
        )
    )


def distance(found: NDArray[np.float32], model: LlamaForCausalLM) -> float:
    """Squares of the errors of the logits by those of transformers'."""
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


@pytest.mark.parametrize(
    ("isq", "narrow", "wide"),
    [("Q4K", "q4_k", "q4_1"), ("8", "q8_0", "q8_0"), ("HQQ4", "hqq4", "hqq4"),
     ("fp8", "f8_e4m3", "f8_e4m3")],
)  # fmt: skip
def test_logits(tmp_path: Path, isq: str, narrow: str, wide: str) -> None:
    """`wide`: of the second layer's 320 columns, which are no multiple of 256."""
    model = model_in(tmp_path)
    plan = Plan.of(isq, Topology.from_text("0: {isq: q8_0}"))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            format = wide if module.in_features % 256 else narrow
            first = ".layers.0." in name
            module.weight.data = quantized(module.weight, "q8_0" if first else format)
    executor = opened(open_checkpoint(tmp_path), plan=plan)
    assert distance(step(executor), model) < 1e-3
    assert {total.format for total in executor.formats} == {"f32", "q8_0", narrow, wide}


def test_three_types_and_layers_that_stay(tmp_path: Path) -> None:
    """A topology written to a file that tells its formats, and is computed in float32."""
    source, out = tmp_path / "model", tmp_path / "quantized" / "m.uqff"
    model = model_in(source, layers=5)
    (tmp_path / "t.yaml").write_text("0: {isq: Q4K}\n1-3: {isq: HQQ4}\n2: {isq: Q8_0}\n")
    topology = Topology.from_file(tmp_path / "t.yaml")
    checkpoint = open_checkpoint(source)
    convert.write(checkpoint, recipes.load(checkpoint), Plan.of(None, topology), out)
    shown = CliRunner().invoke(app, ["inspect", "--json", str(out)])
    told = {tensor["name"]: tensor["format"] for tensor in json.loads(shown.stdout)["tensors"]}
    narrow = ["q4_k", "hqq4", "q8_0", "f32", "f32"]
    for layer, format in enumerate(narrow):
        wide = "q4_1" if format == "q4_k" else format  # rows of 320
        names = [f"uqff.{1 + 7 * layer + i}.weight" for i in range(7)]  # the head is the first
        assert [told[name] for name in names] == [format] * 6 + [wide]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            format = narrow[int(name.split(".")[2])]
            wide = "q4_1" if format == "q4_k" and module.in_features % 256 else format
            module.weight.data = quantized(module.weight, wide)
    read = open_checkpoint(out)
    assert distance(step(opened(read, weights="f32")), model) < 1e-9
    np.testing.assert_array_equal(
        step(opened(read)), step(opened(checkpoint, plan=Plan.of(None, topology)))
    )
