"""Models quantized to UQFF and read again, against the same models quantized while they load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_cases import CONFIG_CASES
from harness import BLOCK, BLOCKS, Build, Built, distance, run
from safetensors.numpy import load_file
from tiny import RMS, Case

from native_executor import native
from squall import convert, decoder, recipes
from squall.checkpoints import Checkpoint, open_checkpoint
from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.quant import Plan, Topology

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
CASES = {case.name: case for case in CONFIG_CASES}
CASES["llama-wide"] = Case("llama-wide", "llama", "LlamaForCausalLM", RMS | WIDE)


def tokenizer_of_bytes(folder: Path, vocab: int) -> None:
    """A tokenizer.json with as many of the byte symbols as there is room for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab - 2]
    names = {"<s>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    library = Tokenizer(models.BPE(names, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def logits(built: Built, checkpoint: Checkpoint, plan: Plan | None = None, **options: Any) -> Any:
    recipe = recipes.load(checkpoint)
    program = decoder.compile(recipe.decoder, recipe.names, context=built.context)
    executor = native(
        program, checkpoint,
        plan=plan, blocks=BLOCKS, block_size=BLOCK, threads=1, kv_dtype="f32", **options,
    )  # fmt: skip
    return run(executor, built.tokens, [len(built.tokens)])


def write(built: Built, path: Path, plan: Plan, **options: Any) -> Checkpoint:
    convert.write(built.checkpoint, built.recipe, plan, path, **options)
    return open_checkpoint(path)


@pytest.mark.parametrize("case", CONFIG_CASES, ids=str)
def test_every_architecture(case: Any, built_folder: Build, tmp_path: Path) -> None:
    built, plan = built_folder(case), Plan.of("q8_0")
    read = write(built, tmp_path / "m.uqff", plan)
    np.testing.assert_array_equal(logits(built, read), logits(built, built.checkpoint, plan))


@pytest.mark.parametrize("name", ["llama-all-biased", "llama-wide"])
@pytest.mark.parametrize("isq", ["q4_0", "q5_1", "q8_1", "q2k", "hqq1", "hqq2", "hqq3", "hqq4"])
def test_every_format(name: str, isq: str, built_folder: Build, tmp_path: Path) -> None:
    built, plan = built_folder(CASES[name]), Plan.of(isq)
    read = write(built, tmp_path / "m.uqff", plan)
    np.testing.assert_array_equal(logits(built, read), logits(built, built.checkpoint, plan))


@pytest.mark.parametrize("isq", ["hqq8", "fp8"])
def test_formats_that_round_once_more(isq: str, built_folder: Build, tmp_path: Path) -> None:
    """UQFF has one factor for FP8, ours one a row; HQQ's zero points are floats of another size."""
    built, plan = built_folder(CASES["llama-wide"]), Plan.of(isq)
    found = logits(built, write(built, tmp_path / "m.uqff", plan))
    exact, wanted = logits(built, built.checkpoint), logits(built, built.checkpoint, plan)
    assert 0 < distance(wanted, exact) < 0.1
    assert distance(found, exact) < 1.5 * distance(wanted, exact)


def test_a_topology(built_folder: Build, tmp_path: Path) -> None:
    built = built_folder(CASES["llama-3"])
    plan = Plan.of(None, Topology.from_text("1-3: {isq: Q8_0}\n2: {isq: HQQ4}"))
    read = write(built, tmp_path / "m.uqff", plan)
    formats = [read.tensors[f"uqff.{i}.weight"].format for i in range(22)]
    assert formats == ["f32"] * 8 + ["q8_0"] * 7 + ["hqq4"] * 7
    np.testing.assert_array_equal(logits(built, read), logits(built, built.checkpoint, plan))


def test_what_lies_beside(built_folder: Build, tmp_path: Path) -> None:
    """The residual file, read by the safetensors package, has all that no linear has."""
    built = built_folder(CASES["llama-all-biased"])
    write(built, tmp_path / "m.uqff", Plan.of("q8_0"))
    stored, kept = built.checkpoint.tensors, load_file(tmp_path / "residual.safetensors")
    norms = {name for name in stored if "norm" in name}
    assert kept.keys() == norms | {"model.embed_tokens.weight"}
    for name, values in kept.items():
        np.testing.assert_array_equal(values, stored[name].to_float32())
    config = (built.checkpoint.path / "config.json").read_bytes()
    assert (tmp_path / "config.json").read_bytes() == config
    assert sorted(load_file(tmp_path / "m.uqff"), key=int) == [str(i) for i in range(22)]


def test_nothing_is_overwritten(built_folder: Build, tmp_path: Path) -> None:
    built, path = built_folder(CASES["llama-3"]), tmp_path / "m.uqff"
    path.write_bytes(b"mine")
    with pytest.raises(InvalidRequest, match="--force"):
        write(built, path, Plan.of("q8_0"))
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]
    write(built, path, Plan.of("q8_0"), force=True)
    write(built, tmp_path / "other.uqff", Plan.of("q4_0"))  # shares what lies beside
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"config\.json exists"):
        write(built, tmp_path / "third.uqff", Plan.of("q4_0"))
    assert not [file for file in tmp_path.iterdir() if "third" in file.name]


def test_nothing_half_written_stays(built_folder: Build, tmp_path: Path) -> None:
    built = built_folder(CASES["llama-3"])
    tokenizer_of_bytes(built.checkpoint.path, built.recipe.decoder.vocab)
    name = "model.layers.2.mlp.down_proj.weight"
    broken = dict(built.checkpoint.tensors)
    values = broken[name].to_float32().copy()
    values[3, 5] = np.nan
    broken[name] = replace(broken[name], view=values.view(np.uint8).reshape(-1), pages=None)
    checkpoint = replace(built.checkpoint, tensors=broken)
    for file in ("m.uqff", "m.gguf"):
        with pytest.raises(InvalidCheckpoint, match=r"down"):
            convert.write(checkpoint, built.recipe, Plan.of("q8_0"), tmp_path / file)
        assert not [f for f in tmp_path.iterdir() if "m." in f.name and f.suffix != ".json"]


def test_other_models_do_not_fit(built_folder: Build, tmp_path: Path) -> None:
    built, path = built_folder(CASES["llama-3"]), tmp_path / "m.uqff"
    write(built, path, Plan.of("q8_0"))
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, problem in (
        ("num_hidden_layers", 2, "22 linears; the model of config.json has 15"),
        ("intermediate_size", 128, "has shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InvalidCheckpoint, match=problem):
            recipes.load(open_checkpoint(path))
    gguf_source = replace(built.checkpoint, kind="gguf")
    with pytest.raises(UnsupportedModel, match="from a folder"):
        convert.write(gguf_source, built.recipe, Plan.of("q8_0"), tmp_path / "x.uqff")
