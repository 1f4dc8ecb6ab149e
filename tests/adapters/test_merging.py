"""Merged models: written as folders and GGUF files, quantized on the way in, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from harness import Float32, distance, run
from peft_models import CASES, LIMITS, Adapted, adapt, beside, merged
from test_lora import EVERYTHING, EXPERTS, TOLERANCE
from test_uqff import tokenizer_of_bytes

from squall import convert, executors
from squall.checkpoints import open_checkpoint
from squall.checkpoints.base import Checkpoint
from squall.decoder import compile
from squall.errors import InvalidRequest
from squall.quant import Plan
from squall.recipes import Recipe, load
from squall.weights import WeightStore

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = [
    "llama-2", "llama-all-biased", "mixtral", "qwen3-moe-mixed", "phi-normed", "phi-3", "gemma-3",
    "smollm3-nope", "stablelm-12b", "cohere-r-plus", "starcoder2-3b",
]  # fmt: skip


def everything(name: str) -> dict[str, Any]:
    saved = {"modules_to_save": ["input_layernorm", "norm"], "bias": "all"}
    experts = {"target_modules": ["q_proj", "lm_head"], "target_parameters": EXPERTS}
    return EVERYTHING | saved | (experts if name == "mixtral" else {})


def logits(model: Adapted, checkpoint: Checkpoint, recipe: Recipe, **options: Any) -> Float32:
    program = compile(recipe.decoder, recipe.names, context=model.context)
    store = WeightStore(checkpoint, **options)
    executor = executors.open(program, store, LIMITS, pool=executors.thread_pool(1))
    return run(executor, model.tokens, [len(model.tokens)])


@pytest.mark.parametrize("name", NAMES)
def test_folders_that_transformers_opens(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = adapt(CASES[name], tmp_path, **everything(name))
    (model.base / "tokenizer.json").write_text("{}")
    checkpoint, out, seen = model.checkpoint, tmp_path / "merged", []
    convert.merge_folder(
        checkpoint, load(checkpoint), [(model.read(), 1.0)], out,
        progress=lambda done, whole: seen.append((done, whole)),
    )  # fmt: skip
    files = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not any(name.endswith(".index.json") for name in files)
    assert seen == sorted(seen)
    assert seen[-1] == (seen[-1][1],) * 2
    again = open_checkpoint(out)
    assert distance(logits(model, again, load(again)), model.logits) < TOLERANCE
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    with torch.no_grad():
        found = theirs(torch.tensor([model.tokens])).logits[0].numpy()
    assert distance(found, model.logits) < TOLERANCE


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "mixtral-single", "phi3", "gemma", "smollm3"])
def test_gguf_files(name: str, kind: str, tmp_path: Path) -> None:
    model = adapt(CASES[name], tmp_path, kind, **everything(name))
    if kind == "folder":
        tokenizer_of_bytes(model.base, model.logits.shape[1])
    checkpoint = model.checkpoint
    edited = convert.merged(checkpoint, load(checkpoint), [(model.read(), 1.0)])
    out = tmp_path / "merged.gguf"
    convert.write(*edited, Plan(), out)
    again = open_checkpoint(out)
    assert distance(logits(model, again, load(again)), model.logits) < TOLERANCE


@pytest.mark.parametrize("adapted", ["embed_tokens", "lm_head"])
def test_tied_weights_part(adapted: str, tmp_path: Path) -> None:
    model = adapt(CASES["llama-biased-tied"], tmp_path, r=4, target_modules=[adapted])
    checkpoint, lora = model.checkpoint, model.read()
    assert distance(merged(model, (lora, 1.0)), model.logits) < TOLERANCE
    convert.merge_folder(checkpoint, load(checkpoint), [(lora, 1.0)], tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    tensors = open_checkpoint(tmp_path / "out").tensors
    base = checkpoint.tensors["model.embed_tokens.weight"].data
    same = {name: np.array_equal(tensors[name].data, base) for name in tensors if "." in name}
    assert same["lm_head.weight"] == (adapted == "embed_tokens")
    assert same["model.embed_tokens.weight"] == (adapted == "lm_head")


def test_gguf_files_get_no_keys_of_folders(tmp_path: Path) -> None:
    model = adapt(CASES["llama-biased-tied"], tmp_path, "gguf", r=4, target_modules=["lm_head"])
    checkpoint = model.checkpoint
    edited = convert.merged(checkpoint, load(checkpoint), [(model.read(), 1.0)])
    convert.write(*edited, Plan(), tmp_path / "merged.gguf")
    again = open_checkpoint(tmp_path / "merged.gguf")
    assert "tie_word_embeddings" not in again.metadata
    assert distance(logits(model, again, load(again)), model.logits) < TOLERANCE


def test_weights_that_half_floats_cannot_be(tmp_path: Path) -> None:
    model = adapt(CASES["llama-2"], tmp_path, r=4, target_modules=["q_proj"])
    tiny.build(CASES["llama-2"]).half().save_pretrained(model.base)
    checkpoint, out = model.checkpoint, tmp_path / "out"
    loras = [(model.read(), 1e6)]
    with pytest.raises(InvalidRequest, match="too large"):
        convert.merge_folder(checkpoint, load(checkpoint), loras, out)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_weights_of_adapters_add_up(tmp_path: Path) -> None:
    model = adapt(CASES["llama-2"], tmp_path, **EVERYTHING)
    lora = model.read()
    parts = merged(model, (lora, 0.25), (lora, 0.75))
    assert distance(parts, model.logits) < TOLERANCE
    assert distance(beside(model, (lora, 0.25), (lora, 0.75)), model.logits) < TOLERANCE
    assert distance(merged(model, (lora, 0.0)), model.plain) < TOLERANCE


def test_quantization_takes_merged_weights(tmp_path: Path) -> None:
    model = adapt(CASES["llama-2"], tmp_path, **EVERYTHING)
    checkpoint, plan = model.checkpoint, Plan.of("q8_0")
    recipe, loras = load(checkpoint), [(model.read(), 1.0)]
    convert.merge_folder(checkpoint, recipe, loras, tmp_path / "out")
    offline = open_checkpoint(tmp_path / "out")
    wanted = logits(model, offline, load(offline), plan=plan)
    np.testing.assert_array_equal(merged(model, *loras, plan=plan), wanted)
    assert distance(wanted, model.logits) > 100 * TOLERANCE


def test_half_floats_stay_what_they_are(tmp_path: Path) -> None:
    import torch

    model = adapt(CASES["llama-2"], tmp_path, **EVERYTHING)
    theirs = tiny.build(CASES["llama-2"]).to(torch.bfloat16)
    theirs.save_pretrained(model.base)
    checkpoint = model.checkpoint
    edited, recipe = convert.merged(checkpoint, load(checkpoint), [(model.read(), 1.0)])
    assert {tensor.format for tensor in edited.tensors.values()} == {"bf16"}
    found = logits(model, edited, recipe)
    assert distance(found, model.logits) < 0.05
    np.testing.assert_array_equal(merged(model, (model.read(), 1.0)), found)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    model = adapt(CASES["llama-2"], tmp_path, r=4, target_modules=["down_proj"])
    checkpoint, lora = model.checkpoint, model.read()
    convert.write(checkpoint, load(checkpoint), Plan.of("q4_0"), tmp_path / "m.uqff")
    quantized = open_checkpoint(tmp_path / "m.uqff")
    edited = convert.merged(quantized, load(quantized), [(lora, 1.0)])
    with pytest.raises(InvalidRequest, match=r"down are quantized \(q4_0\).*beside"):
        logits(model, *edited)
    with pytest.raises(InvalidRequest, match="float weights"):
        convert.merge_folder(quantized, load(quantized), [(lora, 1.0)], tmp_path / "out")


def test_what_is_there_stays(tmp_path: Path) -> None:
    model = adapt(CASES["llama-2"], tmp_path, r=4, target_modules=["down_proj"], lora_bias=True)
    checkpoint, loras = model.checkpoint, [(model.read(), 1.0)]
    with pytest.raises(InvalidRequest, match="has a bias for"):
        convert.merge_folder(checkpoint, load(checkpoint), loras, tmp_path / "out")
    with pytest.raises(InvalidRequest, match="exists"):
        convert.merge_folder(checkpoint, load(checkpoint), loras, model.base)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
