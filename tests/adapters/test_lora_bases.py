"""LoRA beside quantized bases, against PEFT with the values that the base stands for."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import packed_folder
import pytest
import test_ggml
import tiny
from harness import distance
from packed_folder import Packing
from peft_models import CASES, Adapted, adapt, beside, save_adapter, save_base
from test_lora import EVERYTHING, TOLERANCE
from test_uqff import tokenizer_of_bytes

from squall import convert
from squall.adapters.target import Target
from squall.checkpoints import open_checkpoint
from squall.quant import Plan
from squall.recipes import load
from squall.recipes.config import RECIPES
from squall.recipes.modules import row_order
from squall.roles import roles

pytestmark = pytest.mark.filterwarnings("ignore")
WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 3}
CONFIG = EVERYTHING | {"modules_to_save": ["v_proj"]}
CONFIG |= {"target_modules": [m for m in EVERYTHING["target_modules"] if m != "v_proj"]}
ROUGH = 0.2  # the median of rows: activations are of 8 bits beside weights that are quantized


def wide(name: str) -> tiny.Case:
    case = CASES[name]
    return replace(case, config=case.config | WIDE)


def with_values_of(base: Path, model: Any) -> Any:
    """The model with the weights that are in the base."""
    import torch

    checkpoint = open_checkpoint(base)
    recipe = load(checkpoint)
    target = Target.of(checkpoint, recipe)
    state = model.state_dict()
    naming = RECIPES[type(model).__name__].naming
    for role, shape in roles(recipe.decoder).items():
        if len(shape) > 1 and "experts" not in role:
            stem = role.removesuffix(".weight")
            values = target.values((stem, 0))
            order = (
                row_order(target.gguf, recipe.decoder, stem) if checkpoint.kind == "gguf" else None
            )
            values = values if order is None else values[np.argsort(order)]
            if naming.name(role) in state:
                state[naming.name(role)].copy_(torch.from_numpy(values.copy()))
    return model


def check(base: Path, model: Any, **config: Any) -> None:
    tokens = np.random.default_rng(5).integers(3, model.config.vocab_size, tiny.PROMPT).tolist()
    import torch

    with torch.no_grad():
        plain = model(torch.tensor([tokens])).logits[0].numpy()
    found = save_adapter(copy.deepcopy(model), base.parent / "adapter", tokens, **config)
    adapted = replace(found, base=base, plain=plain)
    lora = adapted.read()
    assert distance(plain, adapted.logits) > 0.05
    assert distance(beside(adapted, (lora, 1.0), exact=True), adapted.logits) < TOLERANCE
    rows = zip(beside(adapted, (lora, 1.0)), adapted.logits, strict=True)
    assert np.median([distance(*row) for row in rows]) < ROUGH


@pytest.mark.parametrize("isq", ["q4k", "q8_0", "q6k"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "smollm3", "phi2"])
def test_gguf(name: str, isq: str, tmp_path: Path) -> None:
    case = wide(name)
    model = tiny.build(case)
    plain = open_checkpoint(save_base(model, case, tmp_path, "gguf"))
    base = tmp_path / "quantized.gguf"
    convert.write(plain, load(plain), Plan.of(isq), base)
    check(base, with_values_of(base, model), **CONFIG)


@pytest.mark.parametrize("isq", ["q4_0", "hqq4", "fp8"])
@pytest.mark.parametrize("name", ["llama-2", "phi-3"])
def test_uqff(name: str, isq: str, tmp_path: Path) -> None:
    case = wide(name)
    model = tiny.build(case)
    plain = open_checkpoint(save_base(model, case, tmp_path, "folder"))
    base = tmp_path / "quantized.uqff"
    convert.write(plain, load(plain), Plan.of(isq), base)
    if name == "phi-3":
        check_fused(base, model)
    else:
        check(base, with_values_of(base, model), **CONFIG)


def check_fused(base: Path, model: Any) -> None:
    """Of a model whose q, k and v are one module."""
    import torch

    checkpoint = open_checkpoint(base)
    target, state = Target.of(checkpoint, load(checkpoint)), model.state_dict()
    for layer in range(len(target.decoder.layers)):
        for end in ("self_attn.qkv_proj", "mlp.gate_up_proj", "self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{end}"
            rows = [target.values(site) for site, _, _ in target.sites(name)]
            state[f"{name}.weight"].copy_(torch.from_numpy(np.concatenate(rows)))
    for name, role in (("lm_head", "head"), ("model.embed_tokens", "embed")):
        state[f"{name}.weight"].copy_(torch.from_numpy(target.values((role, 0)).copy()))
    check(base, model, **EVERYTHING)


PACKINGS = [Packing("gptq", 4, 64, True), Packing("gptq", 8, 128, False), Packing("awq", 4, 64)]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packed_folders(packing: Packing, tmp_path: Path) -> None:
    model = tiny.build(wide("llama-2"))
    model = packed_folder.save(model, packing, tmp_path / "base", seed=3)
    check(tmp_path / "base", model, **CONFIG)


@pytest.mark.parametrize("kind", [test_ggml.QUANTS.F32, test_ggml.QUANTS.Q5_1], ids=str)
def test_ggml_files(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    size = tiny.SIZES
    case = replace(CASES["llama"], config=CASES["llama"].config | {
        "vocab_size": len(test_ggml.VOCABULARY), "rms_norm_eps": 1e-5,
        "num_key_value_heads": size["num_attention_heads"],
    })  # fmt: skip
    model = tiny.build(case)
    source = save_base(model, case, tmp_path, "gguf")
    sizes = (size["vocab_size"], size["hidden_size"], 1, size["num_attention_heads"],
             size["num_hidden_layers"], 32, 0)  # fmt: skip
    hparams = (len(test_ggml.VOCABULARY), *sizes[1:])
    base = test_ggml.write(
        tmp_path / "base.ggml", hparams, test_ggml.VOCABULARY,
        test_ggml.model_tensors(source, kind),
    )  # fmt: skip
    check(base, with_values_of(base, model), **CONFIG)


def test_adapters_beside_weights_that_are_quantized_on_the_way_in(tmp_path: Path) -> None:
    model = adapt(wide("llama-2"), tmp_path, **CONFIG)
    lora = model.read()
    tokenizer_of_bytes(model.base, model.logits.shape[1])
    plan = Plan.of("q8_0")
    checkpoint = model.checkpoint
    convert.write(checkpoint, load(checkpoint), plan, tmp_path / "m.gguf")
    file: Adapted = replace(model, base=tmp_path / "m.gguf")
    rows = zip(beside(file, (file.read(), 1.0)), beside(model, (lora, 1.0)), strict=True)
    assert np.median([distance(*row) for row in rows]) < ROUGH


def test_quantized_tables_stay_beside_their_adapters(tmp_path: Path) -> None:
    """PEFT saves the base's table with an adapter of it, and nobody trained that."""
    case = wide("qwen2")
    model = tiny.build(case)
    plain = open_checkpoint(save_base(model, case, tmp_path, "gguf"))
    base = tmp_path / "quantized.gguf"
    convert.write(plain, load(plain), Plan.of("q8_0"), base)
    found = save_adapter(model, tmp_path / "adapter", [5], r=4, target_modules=["lm_head"])
    lora = replace(found, base=base).read()
    assert [(term.a is None, term.rank) for term in lora.terms.values()] == [(False, 4)]
