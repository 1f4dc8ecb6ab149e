"""A context of 16,000 tokens: transformers' logits, and the same bits however steps are cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from convert import convert
from harness import Float32, distance

from native_executor import native
from squall import decoder
from squall.batch import Batch
from squall.checkpoints import open_gguf
from squall.executors import CacheType
from squall.executors.native import NativeExecutor
from squall.recipes import load

DEPTH, LAST, BLOCK = 16_400, 32, 16
TABLE = np.random.default_rng(3).permutation(-(-DEPTH // BLOCK)).astype(np.int32)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CASE = tiny.Case(
    "deep",
    "llama",
    "LlamaForCausalLM",
    tiny.RMS | SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 20_000},
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("deep") / "deep.gguf"
    convert(tiny.build(CASE), CASE.architecture, found, **CASE.options)
    return found


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(5).integers(3, 160, DEPTH).tolist()


def opened(path: Path, threads: int, cache: CacheType) -> NativeExecutor:
    checkpoint = open_gguf(path)
    recipe = load(checkpoint)
    return native(
        decoder.compile(recipe.decoder, recipe.names, context=DEPTH),
        checkpoint,
        threads=threads,
        kv_dtype=cache,
        blocks=len(TABLE),
        block_size=BLOCK,
        max_rows=512,
        max_outputs=LAST,
    )


def step(
    executor: NativeExecutor, tokens: list[int], runs: Sequence[range], wanted: int
) -> Float32:
    """Runs of positions of one context, each as if it were a sequence; logits of the last rows."""
    at = np.concatenate([np.asarray(run, np.int32) for run in runs])
    return executor.step(
        Batch(
            tokens=np.asarray(tokens, np.int32)[at],
            positions=at,
            bounds=np.cumsum([0, *map(len, runs)]).astype(np.int32),
            block_tables=np.tile(TABLE, (len(runs), 1)),
            outputs=np.arange(len(at) - wanted, len(at), dtype=np.int32),
        )
    )


def filled(executor: NativeExecutor, tokens: list[int]) -> Float32:
    """Logits of the last rows, computed as prompts are."""
    for start in range(0, DEPTH - LAST, 512):
        step(executor, tokens, [range(start, min(start + 512, DEPTH - LAST))], 0)
    return step(executor, tokens, [range(DEPTH - LAST, DEPTH)], LAST)


@pytest.fixture(scope="module")
def expected(tokens: list[int]) -> Float32:
    model = tiny.build(CASE)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(torch.tensor([tokens]), logits_to_keep=LAST).logits[0].numpy()


@pytest.mark.parametrize(("cache", "most"), [("f32", 1e-4), ("f16", 2e-3), ("q8_0", 2e-2)])
def test_16k(
    cache: CacheType, most: float, path: Path, tokens: list[int], expected: Float32, nightly: bool
) -> None:
    wanted = None
    for threads in (1, 2, 3) if nightly else (1, 2):
        executor = opened(path, threads, cache)
        found = filled(executor, tokens)
        wanted = found if wanted is None else wanted
        assert distance(found, expected) <= most
        assert found.tobytes() == wanted.tobytes()
        for many in (1, 2, 3, 5, 8, 16, 31, 32):
            rows = [range(at, at + 1) for at in range(DEPTH - many, DEPTH)]
            assert step(executor, tokens, rows, many).tobytes() == wanted[-many:].tobytes()
