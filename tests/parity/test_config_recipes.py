"""config.json: what is refused, what is the same in other words, and every kind of float."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import transformers
from config_cases import CONFIG_CASES
from harness import Build, Built, MakeExecutor, distance, run, run_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Case

from native_executor import native
from squall.checkpoints.base import ByteTensor, Checkpoint, Tensor
from squall.checkpoints.folder import open_folder
from squall.decoder import compile
from squall.errors import InvalidCheckpoint, InvalidRequest, SquallError, UnsupportedModel
from squall.recipes import load
from squall.recipes.config import NAMES, RECIPES, SEERS
from squall.recipes.names import Naming, locate
from squall.roles import roles

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import config_keys

BY_NAME = {case.name: case for case in CONFIG_CASES}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def altered(model: Built, config: Mapping[str, Any], **tensors: Tensor | None) -> Checkpoint:
    """The checkpoint with other values (... removes one) and tensors (dots as __)."""
    old = model.checkpoint
    values = {k: v for k, v in {**old.metadata, **config}.items() if v is not ...}
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {k: v for k, v in {**old.tensors, **new}.items() if v is not None}
    return dataclasses.replace(old, metadata=values, tensors=kept)


def tensor(name: str, *shape: int, format: str = "f32") -> Tensor:
    data = np.ones(shape, np.float32).reshape(-1).view(np.uint8)
    return ByteTensor(name, format, shape, data)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INVALID: dict[str, list[Any]] = {
    "architectures": ["LlamaForCausalLM", ["LlamaForCausalLM"] * 2, [3]],
    "num_hidden_layers": [..., None, 0, -1, 4, 4096, 10**9, 10**30, "3", 3.0, True, [3]],
    "max_position_embeddings": [None, 0, 2**40],
    "hidden_size": [..., 64, 0, 10**12, -128],
    "intermediate_size": [..., 100, 2**62],
    "vocab_size": [..., 161, 159, 10**12],
    "num_attention_heads": [..., 0, 3, 8, 10**9],
    "num_key_value_heads": [0, 3, 2, "2"],
    "head_dim": [0, 64, 10**6],
    "rms_norm_eps": [0.0, -1.0, float("nan"), float("inf"), 2.0, "1", True],
    "hidden_act": [3],
    "attention_bias": ["no", 1],
    "tie_word_embeddings": ["no"],
    "rope_parameters": [
        ROPE | {"rope_theta": theta} for theta in (1.0, 0.0, float("nan"), "x", 10**400)
    ] + [
        ROPE | {"partial_rotary_factor": share} for share in (0.0, -1.0, 1.5, 0.01)
    ] + [
        {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0}, {"rope_type": 3},
        {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 15},
        {"rope_type": "longrope", "short_factor": [0.0] * 16, "long_factor": [1.0] * 16},
        {"rope_type": "longrope", "short_factor": [1.0] * 16},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
        {"rope_type": "dynamic", "factor": 0.5},
    ],
}  # fmt: skip
UNSUPPORTED: dict[str, list[Any]] = {
    "architectures": [["MambaForCausalLM"]],
    "num_hidden_layers": [2],
    "hidden_act": ["mish"],
    "rope_parameters": [
        {"rope_type": "mrope"}, {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    ],
    "per_layer_config": [{"0": {"num_key_value_heads": 2}}],
    "quantization_config": [{"quant_method": "gptq"}],
}  # fmt: skip


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(key, value) for key, values in table.items() for value in values]


@pytest.mark.parametrize(("key", "value"), pairs(INVALID))
def test_invalid_values(key: str, value: Any, built_folder: Build) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        load(altered(built_folder(BY_NAME["llama-2"]), {key: value}))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("key", "value"), pairs(UNSUPPORTED))
def test_unsupported_values(key: str, value: Any, built_folder: Build) -> None:
    with pytest.raises(UnsupportedModel):
        load(altered(built_folder(BY_NAME["llama-2"]), {key: value}))


# What transformers' LlamaConfig declares and does not compute with, or takes so anyway.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_dropout", 0.1), ("pretraining_tp", 2), ("rope_scaling", None),
        ("rope_scaling", {}), ("torch_dtype", "bfloat16"),
        ("rms_norm_eps", 0.01), ("head_dim", None), ("num_key_value_heads", None),
        ("quantization_config", None), ("architectures", None), ("architectures", []),
        ("architectures", ...), ("per_layer_config", None), ("_private", {"to": "a saver"}),
        ("max_position_embeddings", ...), ("auto_map", {"AutoModel": "evil.Model"}),
    ],
)  # fmt: skip
def test_harmless_values_change_nothing(
    key: str, value: Any, built_folder: Build, caplog: pytest.LogCaptureFixture
) -> None:
    model = built_folder(BY_NAME["llama-2"])
    found = load(altered(model, {key: value})).decoder
    context = model.recipe.decoder.context
    assert dataclasses.replace(found, context=context) == model.recipe.decoder
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_llama_config", True), ("transformers.js_config", {"dtype": {"fp16": "x"}}),
        ("dual_chunk_attention_config", {"chunk_size": 262144}), ("activation", "swiglu"),
        ("sliding_window", 7), ("layer_types", ["full_attention"] * 3), ("num_beams", 4),
        ("attention_multiplier", 0.3), ("use_bidirectional_attention", True),
        ("neftune_noise_alpha", 5), ("a_key_of_the_future", [1, {"deep": {"er": 1}}]),
        ("rope_parameters", ROPE | {"mrope_section": [1]}),
        ("rope_parameters", ROPE | {"factor": 2.0}),
    ],
)  # fmt: skip
def test_what_the_architecture_does_not_read_is_named_once(
    key: str, value: Any, built_folder: Build, caplog: pytest.LogCaptureFixture
) -> None:
    model = built_folder(BY_NAME["llama-2"])
    assert load(altered(model, {key: value})).decoder == model.recipe.decoder
    (record,) = caplog.records
    assert record.name == "squall"
    assert repr(key)[1:-1] in record.getMessage()


def test_the_architecture_of_a_model_type(built_folder: Build) -> None:
    for name in ("mistral-window", "phi-3.5-moe", "gemma-3", "qwen3-moe", "smollm3-nope"):
        model = built_folder(BY_NAME[name])
        found = load(altered(model, {"architectures": ...}))
        assert found.architecture == model.recipe.architecture
        assert found.decoder == model.recipe.decoder
    llama = built_folder(BY_NAME["llama-2"])
    for model_type in ("mamba", None, 3, [], ...):
        with pytest.raises(InvalidCheckpoint, match="model_type"):
            load(altered(llama, {"architectures": ..., "model_type": model_type}))


def test_a_second_name_of_a_key(built_folder: Build) -> None:
    model = built_folder(BY_NAME["mixtral-window"])
    other = altered(model, {"num_local_experts": ..., "num_experts": 6})
    assert load(other).decoder == model.recipe.decoder


def test_the_table_of_keys_is_that_of_transformers() -> None:
    table = json.loads(config_keys.PATH.read_text())
    if table["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {table['transformers']}")
    assert json.loads(json.dumps(config_keys.table())) == table


OLD: dict[str, dict[str, Any]] = {
    "llama-2": {"rope_theta": 10000.0},
    "llama-3": {"rope_theta": 10000.0, "rope_scaling": {
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "llama-far": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "phi-3-long": {"rope_theta": 10000.0, "rope_scaling": {"type": "su"}},
    "phi-2": {"partial_rotary_factor": 0.5},
    "stablelm-3b": {"partial_rotary_factor": 0.25},
    "gemma-3": {"rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_rope_in_the_words_of_older_files(name: str, built_folder: Build) -> None:
    model = built_folder(BY_NAME[name])
    old = OLD[name]
    if name == "phi-3-long":
        now = model.checkpoint.metadata["rope_parameters"]
        assert isinstance(now, dict)
        factors = {key: now[key] for key in ("short_factor", "long_factor")}
        old = old | {"rope_scaling": old["rope_scaling"] | factors}
    changed = altered(model, {"rope_parameters": ..., **old})
    assert load(changed).decoder == model.recipe.decoder


def test_names_of_architectures(built_folder: Build) -> None:
    model = built_folder(BY_NAME["mistral-window"])
    without = altered(model, {"architectures": ..., "model_type": ...})
    assert load(without, "mistral").decoder == model.recipe.decoder
    assert load(without, "MistralForCausalLM").decoder == model.recipe.decoder
    with pytest.raises(UnsupportedModel, match=r"'mamba'; known: .*Llama.*mixtral"):
        load(without, "mamba")
    common = {"mistral", "gemma", "mixtral", "phi2", "phi3", "qwen2", "starcoder2", "phi3.5moe"}
    assert NAMES.keys() >= common
    assert RECIPES.keys() | SEERS.keys() >= set(NAMES.values())


def test_a_gguf_file_says_what_it_is(built: Build) -> None:
    with pytest.raises(InvalidRequest, match="GGUF"):
        load(built(tiny.CASES[0]).checkpoint, "llama")


def test_tensors_must_fit(built_folder: Build) -> None:
    model, up = built_folder(BY_NAME["llama-2"]), "model__layers__1__mlp__up_proj__weight"
    with pytest.raises(InvalidCheckpoint, match=r"layers\.1\.mlp\.up_proj\.weight' is missing"):
        load(altered(model, {}, **{up: None}))
    with pytest.raises(InvalidCheckpoint, match=r"\(192, 64\).*\(192, 128\)"):
        load(altered(model, {}, **{up: tensor("x", 192, 64)}))
    with pytest.raises(UnsupportedModel, match="i32"):
        load(altered(model, {}, **{up: tensor("x", 192, 128, format="i32")}))
    with pytest.raises(UnsupportedModel, match=r"self_attn\.q_proj\.bias"):
        load(altered(model, {}, model__layers__0__self_attn__q_proj__bias=tensor("x", 128)))
    for place in ("model__layers__0__self_attn__", "model__"):
        buffer = {f"{place}rotary_emb__inv_freq": tensor("x", 16)}
        assert load(altered(model, {}, **buffer)).decoder == model.recipe.decoder


def test_a_head_that_is_the_table(built_folder: Build) -> None:
    """Tied where config.json says so, unless the file has a head that differs."""
    model = built_folder(BY_NAME["llama-2"])
    table = model.checkpoint.tensors["model.embed_tokens.weight"]
    tied, head = {"tie_word_embeddings": True}, "lm_head.weight"
    assert load(altered(model, tied, lm_head__weight=None)).decoder.tied
    assert load(altered(model, tied, lm_head__weight=table)).decoder.tied
    assert not load(altered(model, tied)).decoder.tied
    assert load(altered(model, {"tie_word_embeddings": ...}, lm_head__weight=None)).decoder.tied
    assert head in model.checkpoint.tensors
    with pytest.raises(InvalidCheckpoint, match=head):
        load(altered(model, {"tie_word_embeddings": False}, lm_head__weight=None))


@pytest.mark.parametrize(
    ("inner", "head"),
    [("language_model.model.", "language_model.lm_head"), ("model.language_model.", "lm_head")],
)
def test_the_language_model_of_a_multimodal_one(inner: str, head: str, built_folder: Build) -> None:
    model = built_folder(BY_NAME["gemma-3"])
    old = model.checkpoint
    moved = {name.replace("model.", inner, 1): tensor for name, tensor in old.tensors.items()}
    moved[f"{head}.weight"] = moved[f"{inner}embed_tokens.weight"]
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": dict(old.metadata),
        "vision_config": {"hidden_size": 3},
    }
    found = load(dataclasses.replace(old, metadata=config, tensors=moved))
    assert found.decoder == model.recipe.decoder
    assert found.names["norm.weight"][0].tensor == f"{inner}norm.weight"


def test_a_language_model_has_one_part(built_folder: Build) -> None:
    recipe = built_folder(BY_NAME["llama-2"]).recipe
    (part,) = recipe.parts
    assert (part.kind, part.prefix) == ("decoder", "")
    assert recipe.part("decoder") is part
    assert (part.spec, part.names, part.naming) == (recipe.decoder, recipe.names, recipe.naming)
    with pytest.raises(KeyError):
        recipe.part("tower")


def test_parts_of_a_model_share_its_tensors(built_folder: Build) -> None:
    model = built_folder(BY_NAME["llama-2"])
    decoder = (roles(model.recipe.decoder), model.recipe.naming)
    tower = ({"patch.weight": (3, 4)}, Naming({"patch": "vision.patch"}, layer=""))
    tensors = {**model.checkpoint.tensors, "vision.patch.weight": tensor("x", 3, 4)}
    names, seen = locate([decoder, tower], tensors, read=set())
    assert names == model.recipe.names
    assert seen["patch.weight"][0].tensor == "vision.patch.weight"
    with pytest.raises(UnsupportedModel, match=r"vision\.patch"):
        locate([decoder], tensors, read=set())
    with pytest.raises(UnsupportedModel, match=r"model\.embed_tokens"):
        locate([tower], tensors, read=set())


def of_dtypes(model: Any, path: Path, *dtypes: str) -> Checkpoint:
    """A folder with the tensors of `model`, in turn of these dtypes; `model` gets their values."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for number, (name, weight) in enumerate(model.named_parameters()):
        tensors[name] = weight.detach().to(getattr(torch, dtypes[number % len(dtypes)]))
        weight.data.copy_(tensors[name])
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors")
    return open_folder(path)


@pytest.mark.parametrize(
    "dtypes", [("float16",), ("bfloat16",), ("float32", "float16", "bfloat16")]
)
@pytest.mark.parametrize("name", ["llama-3", "phi-3", "gemma-2"])
def test_every_kind_of_float(name: str, dtypes: tuple[str, ...], tmp_path: Path) -> None:
    case = dataclasses.replace(BY_NAME[name], name=f"{name}-{'-'.join(dtypes)}")
    model = tiny.build(case)
    built = run_model(model, case, of_dtypes(model, tmp_path, *dtypes))
    program = compile(built.recipe.decoder, built.recipe.names, context=64)
    executor = native(program, built.checkpoint, blocks=16, kv_dtype="f32", threads=1)
    assert distance(run(executor, built.tokens, [13, 1, 26]), built.logits) < 1e-5


def test_pickles_of_torch(
    built_folder: Build, make_reference: MakeExecutor, tmp_path: Path
) -> None:
    import torch

    case = BY_NAME["llama-3"]
    model, wanted = tiny.build(case), built_folder(case)
    (tmp_path / "config.json").write_text(json.dumps(dict(wanted.checkpoint.metadata)))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = open_folder(tmp_path)
    recipe = load(checkpoint)
    assert recipe.decoder == wanted.recipe.decoder
    program = compile(recipe.decoder, recipe.names, context=64)
    found = run(make_reference(program, checkpoint), wanted.tokens, [40])
    assert distance(found, wanted.logits) < 1e-5


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.integers(0, 300),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-5, 300), max_size=4),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta"]), st.floats()),
)


@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_config_is_run_or_refused(data: st.DataObject, built_folder: Build) -> None:
    case: Case = data.draw(st.sampled_from(CONFIG_CASES))
    model = built_folder(case)
    keys = sorted(model.checkpoint.metadata)
    changed = data.draw(st.dictionaries(st.sampled_from(keys), ODD, min_size=1, max_size=3))
    try:
        recipe = load(altered(model, changed))
        program = compile(recipe.decoder, recipe.names, context=64)
    except SquallError:
        return
    assert program.outputs[0].width == model.recipe.decoder.vocab
