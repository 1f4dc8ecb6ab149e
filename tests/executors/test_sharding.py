"""Programs cut for several ranks: what they compute together, and what each of them has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness import BLOCKS, Build, Built, build, distance, once, run
from lockstep import Lockstep
from numpy.typing import NDArray
from tiny import CASES, CONTEXT, Case

from native_executor import in_memory
from squall.adapters.edits import adaptable
from squall.checkpoints.base import ByteTensor, Checkpoint
from squall.decoder import compile
from squall.errors import InvalidRequest
from squall.executors.sharding import shard
from squall.program import (
    AllReduce,
    Builder,
    CacheLayer,
    Linear,
    Matrix,
    MixtureOfExperts,
    Part,
    Program,
    Slice,
    Vector,
)
from squall.quant import FORMATS, Plan
from squall.weights import Stored, Term, WeightStore, values

BY_NAME = {case.name: case for case in CASES}
# Depth shows nothing here; of the others some have more ranks than KV heads, or odd sizes.
SIZES = [(case, 2) for case in CASES if "deep" not in case.name] + [
    (BY_NAME[name], size)
    for name, size in [("llama", 4), ("llama", 3), ("llama-odd", 3), ("qwen3moe", 4), ("gemma2", 4)]
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return once(tmp_path_factory.mktemp("sharding"), "{}.gguf", build)


def program_of(model: Built) -> Program:
    return compile(model.recipe.decoder, model.recipe.names, context=CONTEXT)


def floats(program: Program) -> int:
    return sum(w.experts * w.rows * w.cols for w in program.weights() if isinstance(w, Matrix))


@pytest.mark.parametrize(("case", "size"), SIZES, ids=str)
def test_all_ranks_together_equal_transformers(case: Case, size: int, built: Build) -> None:
    model = built(case)
    ranks = Lockstep(program_of(model), model.checkpoint, size, blocks=BLOCKS)
    assert distance(run(ranks, model.tokens, [13, 1, 26]), model.logits) < 1e-5


def test_two_ranks_have_half_of_the_layers_and_of_the_cache(built: Build) -> None:
    model = built(BY_NAME["llama"])
    whole, store = program_of(model), WeightStore(model.checkpoint)
    first, second = (shard(whole, store, rank, 2) for rank in range(2))
    tables = 160 * 128  # embeddings, and the head, which only the first has
    assert floats(first) == (floats(whole) - 2 * tables) // 2 + 2 * tables
    assert floats(second) == floats(first) - tables
    assert second.outputs == ()
    for found in (first, second):
        assert [cache.kv_heads for cache in found.caches] == [1] * 4
        assert sum(isinstance(op, AllReduce) for op in found.ops) == 8


def test_places_for_adapters_are_left_out(built: Build) -> None:
    model = built(BY_NAME["llama"])
    whole, store = program_of(model), WeightStore(model.checkpoint)
    assert shard(adaptable(whole), store, 1, 2) == shard(whole, store, 1, 2)


def test_more_ranks_than_kv_heads_have_one_each(built: Build) -> None:
    model = built(BY_NAME["llama"])
    ranks = [shard(program_of(model), WeightStore(model.checkpoint), r, 4) for r in range(4)]
    keys = [
        next(
            w for w in rank.weights() if isinstance(w, Matrix) and w.role.endswith("0.attention.k")
        )
        for rank in ranks
    ]
    assert [key.rows_of and key.rows_of.start for key in keys] == [0, 0, 32, 32]


def test_what_is_normalized_by_the_row_stays_whole(built: Build) -> None:
    model = built(BY_NAME["olmo2"])
    found = shard(program_of(model), WeightStore(model.checkpoint), 1, 2)
    assert [cache.kv_heads for cache in found.caches] == [2] * 4
    assert sum(isinstance(op, AllReduce) for op in found.ops) == 4  # of feed-forwards


def test_blocks_of_a_number_format_stay_together(built: Build) -> None:
    """Down projections have 192 columns, outs 128: six blocks of q4_0, and four."""
    model = built(BY_NAME["llama"])
    whole, store = program_of(model), WeightStore(model.checkpoint, plan=Plan.of("q4_0"))
    found = [shard(whole, store, rank, 4) for rank in range(4)]
    downs = [w for f in found for w in f.weights() if isinstance(w, Matrix) and w.cols_of]
    assert {w.cols % 32 for w in downs} == {0}
    assert sum(w.cols for w in downs if w.role.startswith("layers.0")) == 192 + 128
    with pytest.raises(InvalidRequest, match="cannot be shared out to 7 ranks"):
        shard(whole, store, 0, 7)


def test_residuals_and_biases_are_added_once(built: Build) -> None:
    model = built(BY_NAME["phi2"])
    for rank in range(2):
        found = shard(program_of(model), WeightStore(model.checkpoint), rank, 2)
        sums = {op.x for op in found.ops if isinstance(op, AllReduce)}
        parts = [op for op in found.ops if op.out in sums]
        assert parts
        for op in parts:
            assert isinstance(op, Linear)
            assert (op.residual is None, op.bias is None) == (rank == 1, rank == 1)


def matrix(cols: int, tensor: str = "w", experts: int = 1, rows: int = 6) -> Matrix:
    return Matrix((Slice(tensor, 0, experts * rows),), rows, cols, experts, "layers.0.attention.q")


def quantized(name: str, rng: np.random.Generator) -> tuple[Checkpoint, int]:
    """Two experts of six rows with four blocks each."""
    cols = 4 * FORMATS[name].block
    weights = rng.normal(size=12 * cols).astype(np.float32)
    checkpoint = in_memory({"w": weights.reshape(12, cols)})
    tensor = checkpoint.tensors["w"]
    object.__setattr__(tensor, "format", name)
    object.__setattr__(tensor, "view", FORMATS[name].quantize(weights))
    return checkpoint, cols


@pytest.mark.parametrize("name", ["f32", "bf16", "q8_0", "q4_k", "q6_k", "q3_k"])
def test_rows_and_columns_of_every_expert(name: str, rng: np.random.Generator) -> None:
    checkpoint, cols = quantized(name, rng)
    store, whole = WeightStore(checkpoint), matrix(cols, experts=2)
    start, stop = cols // 4, cols // 4 * 3
    part = Matrix(
        whole.slices, 3, stop - start, 2, whole.role,
        rows_of=Part(2, 5, 6), cols_of=Part(start, stop, cols),
    )  # fmt: skip
    assert store.key(part) != store.key(whole)
    for expert in range(2):
        wanted = values(store.rows(whole, expert), cols)[2:5, start:stop]
        assert np.array_equal(values(store.rows(part, expert), stop - start), wanted)


def test_adapters_that_are_merged_are_cut_too(rng: np.random.Generator) -> None:
    a, b, w = (rng.normal(size=s).astype(np.float32) for s in ((2, 8), (6, 2), (6, 8)))
    bias = rng.normal(size=6).astype(np.float32)

    def stored(x: np.ndarray) -> Stored:  # type: ignore[type-arg]
        return Stored("f32", x.reshape(-1).view(np.uint8), None)

    term = Term(stored(a), stored(b), 2, 0.5, bias)
    merged = {("layers.0.attention.q", 0): (term,)}
    store = WeightStore(in_memory({"w": w, "b": bias[None]}), merged=merged)
    part = Matrix(
        (Slice("w", 0, 6),), 3, 4, role="layers.0.attention.q", rows_of=Part(2, 5, 6),
        cols_of=Part(4, 8, 8),
    )  # fmt: skip
    wanted = (w + 0.5 * b @ a)[2:5, 4:]
    assert np.allclose(values(store.rows(part, 0), 4), wanted, atol=1e-6)
    vector = Vector((Slice("b", 0, 6),), 3, role="layers.0.attention.q.bias", part=Part(2, 5, 6))
    assert np.allclose(store.vector(vector), 2 * bias[2:5])


class Disordered(ByteTensor):
    """Columns 2i + 1 come before columns 2i, as GPTQ may store them."""

    @property
    def order(self) -> NDArray[np.uint32]:
        return np.arange(self.cols, dtype=np.uint32).reshape(-1, 2)[:, ::-1].reshape(-1)


def test_columns_that_are_stored_in_another_order(rng: np.random.Generator) -> None:
    w = rng.normal(size=(6, 8)).astype(np.float16).astype(np.float32)
    stored = Disordered("w", "f32", w.shape, w.reshape(-1).view(np.uint8))
    store = WeightStore(Checkpoint(Path(), {}, {"w": stored}, 0))
    whole, grain = store.cuttable(matrix(8))
    assert (whole.restored, grain) == (True, 1)
    part = replace(whole, cols=4, cols_of=Part(4, 8, 8))
    assert np.array_equal(values(store.rows(part, 0), 4), w[:, [5, 4, 7, 6]])
    b = Builder()
    x = b.value("x", 4)
    program = b.build(b.emit(Linear(b.value("y", 6), x, part)), inputs=[x])
    assert store.arranged(program).ops == program.ops  # nothing is to be gathered


def test_images_that_a_decoder_recalls_are_for_one_rank(built: Build) -> None:
    model = built(BY_NAME["llama"])
    recalling = replace(program_of(model), memories=(CacheLayer(2, 32),))
    with pytest.raises(InvalidRequest, match="it recalls images"):
        shard(recalling, WeightStore(model.checkpoint), 0, 2)


def test_experts_share_their_columns_and_route_alike(built: Build) -> None:
    model = built(BY_NAME["qwen3moe"])
    found = shard(program_of(model), WeightStore(model.checkpoint), 1, 2)
    moes = [op for op in found.ops if isinstance(op, MixtureOfExperts)]
    assert [(op.router.rows, op.up.rows, op.down.cols) for op in moes] == [(6, 48, 48)] * 4
