"""What recipes refuse: files are not trusted, and nothing that matters is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from harness import Build, Built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CASES

from squall.checkpoints.base import ByteTensor, Checkpoint, Tensor
from squall.decoder import compile
from squall.errors import InvalidCheckpoint, SquallError, UnsupportedModel
from squall.recipes import load

BY_NAME = {case.name: case for case in CASES}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def altered(model: Built, metadata: Mapping[str, Any], **tensors: Tensor | None) -> Checkpoint:
    """The checkpoint with other metadata (None: removed) and tensors (dots as __)."""
    old = model.checkpoint
    fields = {k: v for k, v in {**old.metadata, **metadata}.items() if v is not None}
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {k: v for k, v in {**old.tensors, **new}.items() if v is not None}
    return dataclasses.replace(old, metadata=fields, tensors=kept)


def tensor(name: str, *shape: int, value: float = 1.0) -> Tensor:
    data = np.full(shape, value, np.float32).reshape(-1).view(np.uint8)
    return ByteTensor(name, "f32", shape, data)


INVALID = {
    "block_count": [None, 0, -1, 5, 10**9, "4", 4.0, True],
    "context_length": [None, 0, 2**40],
    "embedding_length": [None, 64, 0],
    "feed_forward_length": [None, 100, np.array([192, 192], np.int32)],
    "attention.head_count": [None, 0, 3, 8],
    "attention.head_count_kv": [0, 3, 4, [2, 2]],
    "attention.key_length": [0],
    "attention.layer_norm_rms_epsilon": [None, 0.0, -1.0, float("nan"), float("inf"), 2.0, "1"],
    "attention.sliding_window": [-1, 1.5],
    "rope.freq_base": [1.0, 0.0, -1.0, float("nan"), "1"],
    "rope.dimension_count": [0, 31, 34],
    "rope.scaling.factor": [-1.0, float("nan"), float("inf")],
    "rope.scaling.type": ["longrope", 3],
    "expert_count": [-1, 10**6],
}
UNSUPPORTED = {
    "attention.value_length": [16],
    "attention.causal": [False],
    "attention.max_alibi_bias": [8.0],
    "attention.clamp_kqv": [1.0],
    "attn_logit_softcapping": [50.0],
    "expert_shared_count": [1],
    "logit_scale": [0.5],
    "rope.scaling.type": ["dynamic"],
    "rope.scaling.attn_factor": [1.2],
    "a_key_of_the_future": [1, "x", [1]],
}


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(key, value) for key, values in table.items() for value in values]


@pytest.mark.parametrize(("key", "value"), pairs(INVALID))
def test_invalid_metadata(key: str, value: Any, built: Build) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"llama\.|tensor|experts|heads|rope"):
        load(altered(built(BY_NAME["llama"]), {f"llama.{key}": value}))


@pytest.mark.parametrize(("key", "value"), pairs(UNSUPPORTED))
def test_unsupported_metadata(key: str, value: Any, built: Build) -> None:
    with pytest.raises(UnsupportedModel):
        load(altered(built(BY_NAME["llama"]), {f"llama.{key}": value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", True),
        ("expert_count", 0),
        ("expert_shared_count", 0),
        ("logit_scale", 1.0),
        ("rope.scaling.type", "none"),
        ("rope.scaling.finetuned", False),
        ("use_parallel_residual", False),
        ("vocab_size", 7),
    ],
)
def test_neutral_metadata_changes_nothing(key: str, value: Any, built: Build) -> None:
    model = built(BY_NAME["llama"])
    assert load(altered(model, {f"llama.{key}": value})).decoder == model.recipe.decoder


def test_keys_of_other_programs_are_named(built: Build, caplog: pytest.LogCaptureFixture) -> None:
    model = built(BY_NAME["llama"])
    strange = {"mergekit.method": "slerp", "general.quantized_by": "me", "split.no": 0}
    found = dataclasses.replace(model.checkpoint, metadata={**model.checkpoint.metadata, **strange})
    assert load(found).decoder == model.recipe.decoder
    (record,) = caplog.records
    assert record.getMessage().endswith(": 'mergekit.method'")


def test_lists_with_one_value_a_layer(built: Build) -> None:
    model = built(BY_NAME["llama"])
    fields = {
        "llama.attention.head_count_kv": np.array([2] * 4, np.int32),
        "llama.feed_forward_length": [192] * 4,
    }
    assert load(altered(model, fields)).decoder == model.recipe.decoder


def test_unknown_architecture_names_the_known(built: Build) -> None:
    checkpoint = altered(built(BY_NAME["llama"]), {"general.architecture": "mamba"})
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*gemma3.*llama.*qwen3"):
        load(dataclasses.replace(checkpoint, tensors={}))
    with pytest.raises(InvalidCheckpoint, match=r"general\.architecture"):
        load(altered(built(BY_NAME["llama"]), {"general.architecture": None}))
    with pytest.raises(UnsupportedModel, match="adapter"):
        load(altered(built(BY_NAME["llama"]), {"general.type": "adapter"}))


def test_tensors_must_fit(built: Build) -> None:
    model = built(BY_NAME["llama"])
    with pytest.raises(InvalidCheckpoint, match=r"'blk\.1\.ffn_up\.weight' is missing"):
        load(altered(model, {}, blk__1__ffn_up__weight=None))
    with pytest.raises(InvalidCheckpoint, match=r"\(192, 64\).*\(192, 128\)"):
        load(altered(model, {}, blk__1__ffn_up__weight=tensor("x", 192, 64)))
    with pytest.raises(InvalidCheckpoint, match=r"token_embd\.weight"):
        load(altered(model, {}, token_embd__weight=None))
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q_norm\.weight"):
        load(altered(model, {}, blk__0__attn_q_norm__weight=tensor("x", 32)))
    extra = altered(model, {}, blk__0__attn_rot_embd=tensor("x", 16))
    assert load(extra).decoder == model.recipe.decoder


def test_names_from_the_file_are_shown_safely(built: Build) -> None:
    model, name = built(BY_NAME["llama"]), "\x1b[31m" * 999
    for checkpoint in (
        altered(model, {}, **{name: tensor("x", 1)}),
        altered(model, {f"llama.{name}": 1}),
        altered(model, {"general.architecture": name}),
    ):
        with pytest.raises(UnsupportedModel) as caught:
            load(checkpoint)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


def test_a_missing_head_is_tied(built: Build) -> None:
    model = built(BY_NAME["llama"])
    assert not model.recipe.decoder.tied
    assert load(altered(model, {}, output__weight=None)).decoder.tied


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_rope_factors_must_be_positive(value: float, built: Build) -> None:
    factors = tensor("rope_freqs.weight", 16, value=value)
    with pytest.raises(InvalidCheckpoint, match="rope_freqs"):
        load(altered(built(BY_NAME["llama"]), {}, rope_freqs__weight=factors))


def test_half_a_pair_of_rope_factors(built: Build) -> None:
    model = built(BY_NAME["phi3-longrope-long"])
    with pytest.raises(InvalidCheckpoint, match="incomplete"):
        load(altered(model, {}, rope_factors_long__weight=None))


def test_window_of_old_phi3_files(built: Build) -> None:
    model = built(BY_NAME["phi3"])
    fields = {"phi3.attention.sliding_window": None, "phi3.context_length": 4096}
    assert load(altered(model, fields)).decoder.layers[0].attention.window == 2047
    fields["phi3.attention.sliding_window"] = 0
    assert load(altered(model, fields)).decoder.layers[0].attention.window is None


def test_window_pattern_of_the_file(built: Build) -> None:
    model = built(BY_NAME["gemma3"])
    key = "gemma3.attention.sliding_window_pattern"
    marks = [True, False, True, True, False, True, True]
    found = load(altered(model, {key: marks})).decoder.layers
    assert [layer.attention.window is not None for layer in found] == marks
    found = load(altered(model, {key: 1})).decoder.layers
    assert {layer.attention.window for layer in found} == {None}


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.integers(0, 300),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=2), max_size=8),
    st.lists(st.integers(-5, 300), max_size=8).map(lambda v: np.array(v, np.int64)),
    st.lists(st.floats(), max_size=8).map(np.array),
)


@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_metadata_is_run_or_refused(data: st.DataObject, built: Build) -> None:
    model = built(data.draw(st.sampled_from(CASES)))
    prefix = f"{model.recipe.architecture}."
    keys = sorted(key for key in model.checkpoint.metadata if key.startswith(prefix))
    keys += [f"{prefix}rope.scaling.{key}" for key in ("type", "factor", "yarn_beta_fast")]
    changed = data.draw(st.dictionaries(st.sampled_from(keys), ODD, min_size=1, max_size=3))
    try:
        recipe = load(altered(model, changed))
        program = compile(recipe.decoder, recipe.names, context=64)
    except SquallError:
        return
    widths = {out.name: out.width for out in program.outputs}
    assert widths["logits"] == model.recipe.decoder.vocab
