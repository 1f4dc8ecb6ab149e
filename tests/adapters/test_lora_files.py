"""Files of LoRA adapters: GGUF, pickles, what each field means, and what is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from harness import distance
from peft_models import CASES, Adapted, adapt, beside, merged, write_gguf_lora
from safetensors.torch import load_file, save_file
from test_lora import EXPERTS, MODULES, TOLERANCE

from squall.errors import (
    InvalidCheckpoint,
    InvalidRequest,
    ModelNotFound,
    SquallError,
    UnsupportedModel,
)

pytestmark = pytest.mark.filterwarnings("ignore")
SIMPLE = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "up_proj", "lm_head"]}


@pytest.fixture
def model(tmp_path: Path) -> Adapted:
    return adapt(CASES["llama-2"], tmp_path, **SIMPLE)


def change_config(model: Adapted, **fields: Any) -> None:
    path = model.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(model: Adapted, change: Callable[[dict[str, Any]], None]) -> None:
    path = model.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("case", "kind"),
    # The folder of Qwen2-VL's language model alone is Qwen2's.
    [
        (c, k)
        for c in tiny.CASES
        for k in ("gguf", "folder")
        if (str(c), k) != ("qwen2vl", "folder")
    ],
    ids=str,
)
def test_gguf_adapters(case: tiny.Case, kind: str, tmp_path: Path) -> None:
    experts = {"target_modules": ["q_proj", "k_proj"], "target_parameters": EXPERTS[:2]}
    config = experts if "experts" in str(case.config) else {"target_modules": MODULES}
    config |= {"modules_to_save": ["input_layernorm", "post_attention_layernorm"]}
    model = adapt(case, tmp_path, kind, r=4, lora_alpha=6, rank_pattern={"q_proj": 3}, **config)
    path = tmp_path / "adapter.gguf"
    write_gguf_lora(model, case, path, 6.0)
    lora = model.read(path)
    assert distance(merged(model, (lora, 1.0)), model.logits) < TOLERANCE
    assert lora.alpha == 6.0


def test_gguf_adapters_that_are_quantized(model: Adapted, tmp_path: Path) -> None:
    path, kind = tmp_path / "a.gguf", gguf.GGMLQuantizationType.Q8_0
    write_gguf_lora(model, CASES["llama-2"], path, 8.0, kind)
    exact, found = model.read(), model.read(path)
    assert found.terms.keys() == exact.terms.keys()
    assert {term.a.format for term in found.terms.values()} == {"f32"}
    assert 1e-4 < distance(beside(model, (found, 1.0)), model.logits) < 0.1


def test_pickles(model: Adapted) -> None:
    weights = model.folder / "adapter_model.safetensors"
    wanted = model.read()
    torch.save(load_file(weights), model.folder / "adapter_model.bin")
    weights.unlink()
    found = model.read()
    assert found.digest == wanted.digest
    assert distance(beside(model, (found, 1.0)), model.logits) < TOLERANCE
    again = model.folder / "adapter_model.bin"
    assert model.read(again).digest == wanted.digest


def test_what_an_adapter_says(model: Adapted, tmp_path: Path) -> None:
    change_config(model, base_model_name_or_path="some/base")
    found = model.read()
    assert (found.rank, found.alpha, found.base) == (4, 8.0, "some/base")
    assert found.path == model.folder
    layers = [f"model.layers.{i}." for i in range(3)]
    ends = ("mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj")
    assert found.modules == ("lm_head", *(layer + end for layer in layers for end in ends))
    sizes = (part.data.nbytes for term in found.terms.values() for part in (term.a, term.b))
    assert found.nbytes == sum(sizes)
    renamed = tmp_path / "other name"
    model.folder.rename(renamed)
    change = {"base_model_name_or_path": None, "fan_in_fan_out": True, "lora_dropout": 0.3}
    other = Adapted(model.base, renamed, model.tokens, model.logits, model.plain)
    change_config(other, **change)
    assert other.read().digest == found.digest
    change_config(other, lora_alpha=9)
    assert other.read().digest != found.digest


def test_adapters_of_others_names(model: Adapted) -> None:
    """With the adapter's name in its keys, and the prefix of models that see."""
    wanted = model.read().digest

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            new = name.replace("lora_A.", "lora_A.default.").replace(
                "model.layers", "model.language_model.layers"
            )
            tensors[new] = tensors.pop(name)

    change_tensors(model, rename)
    assert model.read().digest == wanted


MEANT: dict[str, list[Any]] = {
    "r": [2, 8],
    "lora_alpha": [16, 7.5],
    "use_rslora": [True],
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [
        {"q_proj": 2},
        {r"layers\.[01]\.self_attn\..*": 3},
        {"^model.layers.0.mlp.up_proj": 3},
        {"^lm_head$": 3},
        {f"{i}.*": 3 for i in range(65)},
    ],
    "target_modules": [["q_proj", "k_proj", "up_proj"], "all-linear", r".*q_proj", None],
    "exclude_modules": [["q_proj"], r".*layers\.2.*"],
    "modules_to_save": [["q_proj"], ["layers"]],
    "layers_to_transform": [1, [0, 1]],
    "layers_pattern": ["h", ["blocks"], r".*"],
    "lora_bias": [True],
    "use_dora": [True],
    "alora_invocation_tokens": [[1]],
    "trainable_token_indices": [[1]],
    "layer_replication": [[[0, 1]]],
    "megatron_config": [{"a": 1}],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 1}],
    "kasa_config": [{"beta": 1.0}],
    "monteclora_config": [{"a": 1}],
    "peft_type": ["LOHA", "XLORA", 3],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 3],
    "bias": ["some", 1],
    "use_something_new": [True],
    "something_config": [{"a": 1}],
}
CHANGES = [(key, value) for key, values in MEANT.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CHANGES, ids=str)
def test_no_field_is_ignored(key: str, value: Any, model: Adapted) -> None:
    digest = model.read().digest
    change_config(model, **{key: value})
    if key in ("use_rslora", "lora_alpha", "alpha_pattern") and len(str(value)) < 99:
        assert model.read().digest != digest
        return
    with pytest.raises((UnsupportedModel, InvalidCheckpoint), match=r"adapter_config\.json"):
        model.read()


@pytest.mark.parametrize("field", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "value", ["4", -1, 0, float("nan"), float("inf"), 1e30, [], {"q_proj": 0}, {"q_proj": "1"}]
)
def test_numbers_are_checked(field: str, value: Any, model: Adapted) -> None:
    change_config(model, **{field: value})
    with pytest.raises(InvalidCheckpoint, match=field):
        model.read()


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(x|x)*y",
        "(.*)*" * 50,
        r"(\w+\s?)*$",
        "[",
        "(?=a)b",
        r"(a)\1",
        "a" * 5000,
        "(a{1000}){1000}",
    ],
)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"]
)
def test_patterns_take_no_time(pattern: str, field: str, model: Adapted) -> None:
    values = {"rank_pattern": {pattern: 3}, "modules_to_save": [pattern]}
    change_config(model, **{field: values.get(field, pattern)})
    with contextlib.suppress(UnsupportedModel, InvalidCheckpoint):
        model.read()


def replaced(name: str, tensor: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensor})


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no B": (lambda t: t.pop(Q + "B.weight"), "lora_A and lora_B"),
    "no A": (lambda t: t.pop(Q + "A.weight"), "lora_A and lora_B"),
    "a layer less": (lambda t: (t.pop(Q + "A.weight"), t.pop(Q + "B.weight")), "file whole"),
    "wide A": (replaced(Q + "A.weight", torch.zeros(4, 130)), "shapes"),
    "high B": (replaced(Q + "B.weight", torch.zeros(130, 4)), "shapes"),
    "other rank": (replaced(Q + "B.weight", torch.zeros(128, 5)), "of rank 4"),
    "a vector": (replaced(Q + "A.weight", torch.zeros(4)), "of rank 4"),
    "a number": (replaced(Q + "A.weight", torch.tensor(4.0)), "not empty"),
    "a number as a head": (
        replaced("base_model.model.lm_head.weight", torch.tensor(4.0)), "not empty"),
    "a cube": (replaced(Q + "B.weight", torch.zeros(128, 4, 1)), "of rank 4"),
    "empty": (replaced(Q + "A.weight", torch.zeros(0, 128)), "not empty"),
    "no columns": (replaced(Q + "A.weight", torch.zeros(4, 0)), "not empty"),
    "NaN": (replaced(Q + "A.weight", torch.full((4, 128), float("nan"))), "not finite"),
    "infinite": (replaced(Q + "B.weight", torch.full((128, 4), float("inf")).half()), "not finite"),
    "integers": (replaced(Q + "B.weight", torch.zeros(128, 4, dtype=torch.int32)), "format i32"),
    "doubles": (replaced(Q + "B.weight", torch.zeros(128, 4).double()), "format f64"),
    "magnitudes": (
        replaced(Q + "magnitude_vector.weight", torch.zeros(128)), "magnitude_vector"),
    "of no module": (replaced("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight",
                              torch.zeros(4, 128)), "lora_A and lora_B"),
    "a path": (replaced("../../../etc/passwd", torch.zeros(4)), "etc/passwd"),
    "a name": (replaced("x" * 200, torch.zeros(4)), "no part of a LoRA"),
    "another's vocabulary": (
        replaced("base_model.model.lm_head.base_layer.weight", torch.zeros(161, 128)),
        r"the base model has \(160, 128\)"),
    "twice": (replaced(Q + "A.other.weight", torch.zeros(4, 128)), "twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_tensors_are_checked(name: str, model: Adapted) -> None:
    change, reason = HOSTILE[name]
    change_tensors(model, change)
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=reason):
        model.read()


@pytest.mark.parametrize("shape", [(5,), (1,), (1000,), (128, 1), (2, 128)])
def test_biases_of_other_sizes(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = adapt(CASES["llama-2"], tmp_path, lora_bias=True, target_modules=["q_proj"])
    change_tensors(model, replaced(Q + "B.bias", torch.ones(shape)))
    with pytest.raises(InvalidCheckpoint, match="shapes"):
        model.read()


def test_biases_of_tables(tmp_path: Path) -> None:
    """PEFT makes none."""
    model = adapt(CASES["llama-2"], tmp_path, target_modules=["embed_tokens"])
    change_config(model, lora_bias=True)
    name = "base_model.model.model.embed_tokens.lora_embedding_B.bias"
    change_tensors(model, replaced(name, torch.ones(160)))
    with pytest.raises(InvalidCheckpoint, match="shapes"):
        model.read()


def test_many_patterns_take_no_time(model: Adapted) -> None:
    slow = {rf"(?:\w*\W*){{90}}{i}": 3 for i in range(65)}
    for fields in ({"alpha_pattern": slow}, {"modules_to_save": list(slow)}):
        change_config(model, **{"alpha_pattern": {}, **fields})
        with pytest.raises(SquallError, match=r"64 patterns|at most 64"):
            model.read()
    change_config(model, modules_to_save=[], alpha_pattern={f"x.{i}": 3 for i in range(2048)})
    model.read()


def test_long_lists_of_layers(model: Adapted) -> None:
    change_config(model, layers_to_transform=["x"] * 100_000)
    with pytest.raises(InvalidCheckpoint, match="layers_to_transform"):
        model.read()


def test_modules_that_the_base_has_not(model: Adapted) -> None:
    at = "base_model.model.model.layers.9.mlp.up_proj.lora_"
    extra = {at + "A.weight": torch.ones(4, 128), at + "B.weight": torch.ones(192, 4)}
    change_tensors(model, lambda tensors: tensors.update(extra))
    with pytest.raises(InvalidCheckpoint, match=r"layers\.9.*no such module.*made for"):
        model.read()


@pytest.mark.parametrize("size", [(), (127,), (129,), (128, 1)])
def test_biases_have_a_value_a_row(size: tuple[int, ...], tmp_path: Path) -> None:
    model = adapt(CASES["llama"], tmp_path, "gguf", **SIMPLE | {"lora_bias": True})
    change_tensors(model, replaced(Q + "B.bias", torch.zeros(size)))
    with pytest.raises(InvalidCheckpoint, match="q_proj"):
        model.read()


def test_huge_ranks(model: Adapted) -> None:
    pair = {Q + "A.weight": torch.zeros(5000, 128), Q + "B.weight": torch.zeros(128, 5000)}
    change_tensors(model, lambda tensors: tensors.update(pair))
    change_config(model, rank_pattern={"layers.0.self_attn.q_proj": 5000})
    with pytest.raises(InvalidCheckpoint, match="4096"):
        model.read()


def test_truncated_files(model: Adapted) -> None:
    path = model.folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    cuts = np.random.default_rng().integers(0, len(whole), 60)
    for size in (0, 7, 8, 9, len(whole) - 1, *cuts):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidCheckpoint):
            model.read()
    config = model.folder / "adapter_config.json"
    path.write_bytes(whole)
    text = config.read_text()
    for cut in range(0, len(text) - 1, 37):
        config.write_text(text[:cut])
        with pytest.raises(SquallError):
            model.read()


def test_pickles_that_do_something(model: Adapted, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "done",))

    (model.folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, model.folder / "adapter_model.bin")
    with pytest.raises(SquallError):
        model.read()
    assert not (tmp_path / "done").exists()


def test_what_is_not_there(model: Adapted, tmp_path: Path) -> None:
    for path in (
        "/no/such/folder",
        str(tmp_path / "x"),
        str(tmp_path),
        "../x",
        "a/b/c",
        "x.gguf",
        "x" * 5000,
        "~no such user/x",
        "a\0b",
    ):
        with pytest.raises(ModelNotFound, match="adapter"):
            model.read(Path(path))
    (model.folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"adapter_model\.safetensors or adapter_model\.bin"):
        model.read()


def test_gguf_files_of_others(model: Adapted, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf_lora(model, CASES["llama-2"], path, 8.0)
    whole = path.read_bytes()
    for old, new in (
        (b"adapter.type", b"adapter.typo"), (b"adapter", b"another"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb"), (b"lora_a", b"lora_c"),
        (b"blk.2.attn_q", b"blk.9.attn_q"), (struct.pack("<f", 8.0), struct.pack("<f", np.nan)),
        (struct.pack("<f", 8.0), struct.pack("<f", -1)),
    ):  # fmt: skip
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises((UnsupportedModel, InvalidCheckpoint)):
            model.read(path)
    for size in range(0, len(whole), 997):
        path.write_bytes(whole[:size])
        with pytest.raises(SquallError):
            model.read(path)


def test_gguf_adapters_in_blocks(tmp_path: Path) -> None:
    """As the converter's --outtype q8_0 has them: A in blocks, and B, whose rows are short, not."""
    import gguf
    from gguf.quants import dequantize, quantize

    case = CASES["llama-2"]
    model = adapt(case, tmp_path, r=4, lora_alpha=8, target_modules=["v_proj"])
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = load_file(model.folder / "adapter_model.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    rounded = dict(tensors)
    for name, tensor in tensors.items():
        stem = f"blk.{name.split('.')[4]}.attn_v.weight.lora_"
        if "lora_A" in name:
            blocks = quantize(tensor.numpy(), kind)
            rounded[name] = torch.from_numpy(dequantize(blocks, kind))
            writer.add_tensor(stem + "a", blocks, raw_dtype=kind)
        else:
            writer.add_tensor(stem + "b", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(rounded, model.folder / "adapter_model.safetensors")
    assert model.read(tmp_path / "a.gguf").digest == model.read().digest


def test_adapters_that_change_nothing(model: Adapted) -> None:
    with pytest.raises(InvalidRequest):
        beside(model, (replace_terms(model), 1.0))


def replace_terms(model: Adapted) -> Any:
    from dataclasses import replace

    lora = model.read()
    return replace(lora, terms={("layers.9.attention.q", 0): next(iter(lora.terms.values()))})
