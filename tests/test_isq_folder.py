"""A folder of float weights, quantized while it is read, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from squall import decoder, recipes
from squall.batch import Batch
from squall.checkpoints import open_checkpoint
from squall.executors.native import NativeExecutor
from squall.quant import FORMATS, Plan, Topology

TOKENS = list(range(3, 35))


def model_in(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=160, hidden_size=256, intermediate_size=320, num_hidden_layers=2,
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


@pytest.mark.parametrize(
    ("isq", "narrow", "wide"),
    [("Q4K", "q4_k", "q4_1"), ("8", "q8_0", "q8_0"), ("HQQ4", "hqq4", "hqq4"),
     ("fp8", "f8_e4m3", "f8_e4m3")],
)  # fmt: skip
def test_logits(tmp_path: Path, isq: str, narrow: str, wide: str) -> None:
    """`wide`: of the second layer's 320 columns, which are no multiple of 256."""
    model = model_in(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    recipe = recipes.load(checkpoint)
    program = decoder.compile(recipe.decoder, recipe.names, context=64)
    plan = Plan.of(isq, Topology.from_text("0: {isq: q8_0}"))
    executor = NativeExecutor(program, checkpoint, blocks=4, plan=plan, kv_dtype="f32")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            format = wide if module.in_features % 256 else narrow
            first = ".layers.0." in name
            module.weight.data = quantized(module.weight, "q8_0" if first else format)
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0].numpy()
    rows = np.arange(len(TOKENS), dtype=np.int32)
    found = executor.step(
        Batch(
            tokens=np.array(TOKENS, np.int32),
            positions=rows,
            slots=rows,
            bounds=np.array([0, len(rows)], np.int32),
            block_tables=np.arange(2, dtype=np.int32)[None],
            outputs=rows,
        )
    )
    error = np.square(found - wanted).sum() / np.square(wanted).sum()
    assert error < 1e-3
    assert {total.format for total in executor.formats} == {"f32", "q8_0", narrow, wide}
