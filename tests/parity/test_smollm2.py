"""SmolLM2-135M-Instruct in Q4_1 against transformers in float32 on the dequantized weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

import squall
from squall import _native, embedded
from squall.checkpoints.gguf import open_gguf
from squall.executors import CacheType

ENGLISH = Path(__file__).parent.parent / "data" / "english.txt"
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Logits = NDArray[np.float32]


def _unpermuted(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF pairs a head's rows (0, 1), (2, 3), ...; transformers (0, n/2), (1, n/2 + 1), ..."""
    grouped = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return grouped.swapaxes(1, 2).reshape(rows.shape)


def _transformers_model() -> LlamaForCausalLM:
    checkpoint = open_gguf(embedded.find())
    meta: dict[str, Any] = {
        key.removeprefix("llama."): value for key, value in checkpoint.metadata.items()
    }
    heads, kv_heads = int(meta["attention.head_count"]), int(meta["attention.head_count_kv"])
    config = LlamaConfig(
        vocab_size=checkpoint.tensors["token_embd.weight"].rows,
        hidden_size=int(meta["embedding_length"]),
        intermediate_size=int(meta["feed_forward_length"]),
        num_hidden_layers=int(meta["block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=float(meta["attention.layer_norm_rms_epsilon"]),
        rope_parameters={"rope_type": "default", "rope_theta": float(meta["rope.freq_base"])},
        max_position_embeddings=int(meta["context_length"]),
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for i in range(config.num_hidden_layers):
        for ours, theirs in HF_NAMES.items():
            state[f"model.layers.{i}.{theirs}.weight"] = f"blk.{i}.{ours}.weight"
    tensors = {}
    for theirs, ours in state.items():
        value = checkpoint.tensors[ours].to_float32()
        if ours.endswith(("attn_q.weight", "attn_k.weight")):
            value = _unpermuted(value, heads if "attn_q" in ours else kv_heads)
        tensors[theirs] = torch.from_numpy(np.array(value))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def model() -> Iterator[squall.Model]:
    with squall.Model.open(context=2048) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(model: squall.Model, nightly: bool) -> list[int]:
    found = model.encode(ENGLISH.read_text())
    assert len(found) >= 1000
    return found[: 1000 if nightly else 300]


@pytest.fixture(scope="module")
def expected(ids: list[int]) -> Logits:
    with torch.no_grad():
        return _transformers_model()(torch.tensor([ids])).logits[0].numpy()


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_float_weights_give_the_same_logits(ids: list[int], expected: Logits) -> None:
    with squall.Model.open(context=2048, weights="f32", kv_dtype="f32") as exact:
        found = exact.logits(ids)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_packed_weights_stay_close(model: squall.Model, ids: list[int], expected: Logits) -> None:
    ours, theirs = _log_softmax(model.logits(ids)), _log_softmax(expected)
    agreement = float((ours.argmax(1) == theirs.argmax(1)).mean())
    divergence = float((np.exp(theirs) * (theirs - ours)).sum(1).mean())
    rows, following = np.arange(len(ids) - 1), np.array(ids[1:])
    perplexity = np.exp(-ours[rows, following].mean()) / np.exp(-theirs[rows, following].mean())
    assert agreement >= 0.98
    assert divergence <= 2e-3
    assert abs(perplexity - 1) <= 0.005


def test_a_cache_of_8_bits_costs_little(ids: list[int], expected: Logits) -> None:
    with squall.Model.open(context=2048, kv_dtype="q8_0") as model:
        ours, theirs = _log_softmax(model.logits(ids)), _log_softmax(expected)
    divergence = float((np.exp(theirs) * (theirs - ours)).sum(1).mean())
    assert 0 < divergence <= 4e-3


@pytest.mark.parametrize("kv_dtype", ["f16", "q8_0"])
def test_bits_do_not_depend_on_chunks_or_threads(
    ids: list[int], kv_dtype: CacheType, nightly: bool
) -> None:
    found, length = set(), 300 if nightly else 100
    for threads, chunks in ((1, (length, 1, 7, 64)), (2, (length, 7))):
        with squall.Model.open(context=512, threads=threads, kv_dtype=kv_dtype) as model:
            for chunk in chunks:
                model.engine.change_model(lambda: None)
                found.add(model.logits(ids[:length], chunk=chunk).tobytes())
    assert len(found) == 1


def test_bits_do_not_depend_on_the_instruction_set(
    ids: list[int], monkeypatch: pytest.MonkeyPatch, nightly: bool
) -> None:
    found, length = set(), 150 if nightly else 70
    for isa in _native.isas():
        monkeypatch.setenv("SQUALL_ISA", isa)
        with squall.Model.open(context=512) as model:
            assert model.executor.isa == isa
            found.add(model.logits(ids[:length]).tobytes())
    assert len(found) == 1
