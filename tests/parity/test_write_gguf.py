"""Models written as GGUF, read by us and by the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from config_cases import CONFIG_CASES
from harness import Build, distance
from test_uqff import CASES, logits, tokenizer_of_bytes, write

from squall import convert
from squall.checkpoints import open_gguf
from squall.errors import InvalidRequest, UnsupportedModel
from squall.quant import Plan

# Exact floats; sums in another order.
CLOSE = 1e-5
# What GGUF has no architecture, no key or no tensor for -> what the error speaks of.
LOST = {
    "llama-all-biased": "feed_forward.activation",
    "llama-dynamic-near": "DynamicScaling",
    "llama-dynamic-far": "DynamicScaling",
    "qwen2-windows": "sliding_window",
    "qwen3-windows": "sliding_window",
    "qwen3-moe-mixed": "feed_forward",
    "phi-normed": "qk_norm",
    "gemma-3": "window",
    "smollm3-windows": "sliding_window",
}
FOREIGN = ("phi3.5moe", "cohere", "cohere2", "stablelm", "glm", "glm4")


@pytest.mark.parametrize("case", CONFIG_CASES, ids=str)
def test_every_architecture(case: Any, built_folder: Build, tmp_path: Path) -> None:
    built, path = built_folder(case), tmp_path / "m.gguf"
    tokenizer_of_bytes(built.checkpoint.path, built.recipe.decoder.vocab)
    if case.name in LOST or case.architecture in FOREIGN:
        with pytest.raises(UnsupportedModel, match=LOST.get(case.name, "known:")):
            convert.write(built.checkpoint, built.recipe, Plan(), path)
        assert list(tmp_path.iterdir()) == []
        return
    convert.write(built.checkpoint, built.recipe, Plan(), path)
    assert distance(logits(built, open_gguf(path)), logits(built, built.checkpoint)) < CLOSE


@pytest.mark.parametrize("isq", ["q4_0", "q8_0"])
@pytest.mark.parametrize("case", ["llama-3", "gemma-2b", "phi-3", "mixtral-window"])
def test_the_same_values_as_in_uqff(
    case: str, isq: str, built_folder: Build, tmp_path: Path
) -> None:
    """Computed in f32: rows in another order round otherwise, and so do activations of int8."""
    built, path = built_folder(CASES[case]), tmp_path / "m.gguf"
    tokenizer_of_bytes(built.checkpoint.path, built.recipe.decoder.vocab)
    convert.write(built.checkpoint, built.recipe, Plan.of(isq), path)
    found = logits(built, open_gguf(path), weights="f32")
    same = write(built, tmp_path / "m.uqff", Plan.of(isq))
    assert distance(found, logits(built, same, weights="f32")) < CLOSE
    assert distance(found, logits(built, built.checkpoint)) > 100 * CLOSE


def test_the_gguf_package_reads_it(built_folder: Build, tmp_path: Path) -> None:
    built, path = built_folder(CASES["llama-3"]), tmp_path / "m.gguf"
    tokenizer_of_bytes(built.checkpoint.path, built.recipe.decoder.vocab)
    written = convert.write(built.checkpoint, built.recipe, Plan.of("q4_1"), path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == len(built.recipe.decoder.layers)
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert len(fields["tokenizer.ggml.tokens"]) == built.recipe.decoder.vocab
    rmse = {item.name: item.rmse for item in written}
    stored = built.checkpoint.tensors
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "blk.1.ffn_up.weight":
            exact = stored["model.layers.1.mlp.up_proj.weight"].to_float32()
            off = np.sqrt(((values - exact) ** 2).mean() / (exact**2).mean())
            assert off == pytest.approx(rmse[tensor.name], rel=1e-3)
            assert 0.02 < off < 0.12
        if tensor.name == "blk.1.attn_norm.weight":
            exact = stored["model.layers.1.input_layernorm.weight"].to_float32()
            np.testing.assert_array_equal(values, exact)


def test_a_gguf_file_again(built: Build, tmp_path: Path) -> None:
    """From floats in GGUF to quantized, with fused and stacked tensors, and metadata kept."""
    from tiny import CASES as GGUF_CASES

    for name in ("llama-llama3", "phi2", "phi3-longrope-long", "qwen3moe", "gemma3"):
        case = next(case for case in GGUF_CASES if case.name == name)
        model, path = built(case), tmp_path / f"{name}.gguf"
        convert.write(model.checkpoint, model.recipe, Plan.of("q8_0"), path)
        read = open_gguf(path)
        wanted = logits(model, model.checkpoint, Plan.of("q8_0"))
        np.testing.assert_array_equal(logits(model, read), wanted)
        kept = {k: v for k, v in read.metadata.items() if not k.startswith("general.")}
        old = {k: v for k, v in model.checkpoint.metadata.items() if not k.startswith("general.")}
        assert repr(kept) == repr(old)


@pytest.mark.parametrize("isq", ["hqq4", "fp8"])
def test_formats_that_gguf_has_not(isq: str, built_folder: Build, tmp_path: Path) -> None:
    built = built_folder(CASES["llama-3"])
    tokenizer_of_bytes(built.checkpoint.path, built.recipe.decoder.vocab)
    with pytest.raises(UnsupportedModel, match="GGUF has no"):
        convert.write(built.checkpoint, built.recipe, Plan.of(isq), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_importance_changes_the_codes(built_folder: Build, tmp_path: Path) -> None:
    """The columns that matter get closer, at the others' cost."""
    built = built_folder(CASES["llama-wide"])
    tokenizer_of_bytes(built.checkpoint.path, built.recipe.decoder.vocab)
    name, heavy = "blk.0.attn_q", np.ones((1, 256), np.float32)
    heavy[0, ::8] = 1000
    exact = built.checkpoint.tensors["model.layers.0.self_attn.v_proj.weight"].to_float32()
    errors = {}
    for importance in ({}, {"blk.0.attn_v": heavy}):
        path = tmp_path / f"{len(importance)}.gguf"
        plan = Plan.of("q4k")
        convert.write(built.checkpoint, built.recipe, plan, path, importance=importance)
        made = open_gguf(path).tensors["blk.0.attn_v.weight"].to_float32()
        errors[len(importance)] = ((made - exact) ** 2)[:, ::8].mean()
    assert errors[1] < 0.8 * errors[0]
    with pytest.raises(InvalidRequest, match="another model"):
        convert.write(
            built.checkpoint, built.recipe, Plan.of("q4k"), tmp_path / "x.gguf",
            importance={name: heavy[:, :100]},
        )  # fmt: skip
