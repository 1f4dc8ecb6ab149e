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

from native_executor import native
from reference_executor import ReferenceExecutor
from squall.checkpoints import open_checkpoint
from squall.cli.app import app
from squall.decoder import compile
from squall.errors import InvalidRequest, SquallError, UnsupportedModel
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
ORDERED = Packing(act_order=True)
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
    return native(
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


def altered(tmp_path: Path, change: Any, packing: Packing = ORDERED) -> Path:
    """A quantized folder whose config and tensors `change(config, tensors)` has altered."""
    build("llama-2", packing, tmp_path)
    folder = tmp_path / "m"
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / packed_folder.WHOLE)
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / packed_folder.WHOLE)
    return folder


def set_key(key: str, value: Any) -> Any:
    return lambda config, _: config.update({key: value})


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("quant_method", "bitsandbytes", "gptq, awq"),
        ("quant_method", None, "gptq, awq"),
        ("quant_method", [], "gptq, awq"),
        ("bits", 5, "2, 3, 4, 8"),
        ("bits", True, "2, 3, 4, 8"),
        ("bits", [4], "2, 3, 4, 8"),
        ("checkpoint_format", "marlin", "gptq_v2"),
        ("group_size", 0, "multiple of 32"),
        ("group_size", 48, "multiple of 32"),
        ("group_size", -2, "multiple of 32"),
        ("group_size", 1 << 40, "multiple of 32"),
        ("group_size", "128", "multiple of 32"),
        ("dynamic", [8], "single layers"),
        ("dynamic", {"+:.*": {"bits": 8}}, "single layers"),
    ],
)
def test_unsupported_schemes(key: str, value: Any, text: str, tmp_path: Path) -> None:
    folder = altered(tmp_path, set_key(key, value))
    with pytest.raises(UnsupportedModel, match=text):
        open_checkpoint(folder)
    report = inspect(folder)
    assert not report["runs"]
    assert text in report["obstacle"]


def inspect(folder: Path) -> dict[str, Any]:
    shown = CliRunner().invoke(app, ["inspect", "--json", str(folder)])
    assert shown.exit_code == 0
    report: dict[str, Any] = json.loads(shown.stdout)
    return report


NAME = "model.layers.1.mlp.down_proj."


def set_tensor(part: str, change: Any) -> Any:
    def alter(_: Any, tensors: dict[str, Any]) -> None:
        tensors[NAME + part] = np.ascontiguousarray(change(tensors[NAME + part]))

    return alter


def put(index: Any, value: Any) -> Any:
    def change(array: Any) -> Any:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_key("bits", 8), "shape"),
        (set_key("group_size", 64), "shape"),
        (set_tensor("qweight", lambda x: x[:-1]), "shape"),
        (set_tensor("qweight", lambda x: x.reshape(-1)), "shape"),
        (set_tensor("qweight", lambda x: x[:0]), "shape"),
        (set_tensor("qweight", lambda x: x[:, :-1]), "whole words"),
        (set_tensor("qzeros", lambda x: x[:, :-1]), "qzeros.*shape"),
        (set_tensor("scales", lambda x: x[:-1]), "scales.*shape"),
        (set_tensor("g_idx", lambda x: x[:-1]), "g_idx.*shape"),
        (set_tensor("g_idx", put(3, -1)), "g_idx goes from -1"),
        (set_tensor("g_idx", put(3, 2)), "to 2; there are 2 groups"),
        (
            set_tensor("g_idx", lambda x: (np.arange(len(x)) < 100).astype(np.int32)),
            "not multiples of 128",
        ),
        (set_tensor("scales", put((0, 3), np.inf)), "infinite"),
        (set_tensor("scales", put((1, 0), np.nan)), "infinite or NaN"),
        (set_tensor("scales", lambda x: x.astype(np.int16)), "must be f16"),
        (set_tensor("qweight", lambda x: x.astype(np.int64)), "must be i32"),
        (lambda _, tensors: tensors.pop(NAME + "qzeros"), "qzeros.*missing"),
        (lambda _, tensors: tensors.pop(NAME + "g_idx"), "g_idx.*missing"),
        (lambda _, tensors: tensors.pop(NAME + "qweight"), "missing"),
        (lambda _, t: t.update({NAME + "weight": np.ones((128, 256), np.float32)}), "both"),
        (lambda _, t: t.update({NAME + "bias": np.ones(128, np.float32)}), "does not use"),
    ],
)
def test_broken_tensors(change: Any, text: str, tmp_path: Path) -> None:
    folder = altered(tmp_path, change)
    with pytest.raises(SquallError, match=text):
        executor_of(folder)


def executor_of(folder: Path, **options: Any) -> NativeExecutor:
    checkpoint = open_checkpoint(folder)
    recipe = load(checkpoint)
    program = compile(recipe.decoder, recipe.names, context=64)
    return native(program, checkpoint, blocks=4, threads=1, **options)


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    folder = altered(tmp_path, set_key("bits", 4))
    with pytest.raises(InvalidRequest, match="GPTQ, 4 bits"):
        executor_of(folder, plan=Plan.of("q4k"))


def test_inspect_tells_the_scheme(tmp_path: Path) -> None:
    report = inspect(altered(tmp_path, set_key("bits", 4)))
    assert report["quantization"] == "GPTQ, 4 bits, groups of 128, in order of activation"
    assert {total["format"] for total in report["formats"]} == {"int4_g128", "f32"}


def test_old_folders_have_a_file_of_their_own(tmp_path: Path) -> None:
    folder = altered(tmp_path, set_key("bits", 4))
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("quantization_config")
    del own["quant_method"], own["checkpoint_format"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(own))
    assert executor_of(folder).formats


def test_codes_of_three_bits_lie_as_their_packers_document() -> None:
    """Value 10 has its upper bit in the next word, value 21 its upper two."""
    words = packed_folder.to_words([0] * 10 + [0b101] + [0] * 10 + [0b011] + [0] * 9 + [7], 3)
    assert words == [0b01 << 30, 1 | 1 << 31, 0b01 | 7 << 29]
