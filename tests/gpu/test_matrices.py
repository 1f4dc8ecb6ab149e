"""Weights on a device hold what the file's bytes say, in the layout that kernels read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from native_executor import in_memory
from quant.random_blocks import random_blocks
from squall import _native
from squall import program as p
from squall.checkpoints.base import ByteTensor, Checkpoint
from squall.errors import InvalidCheckpoint
from squall.executors.native import Tiles
from squall.gpu.matrices import Float8, Matrices, Packed, Plain, dense, lookup, plain
from squall.quant import FORMATS, Format, Plan
from squall.quant.isq import TYPES
from squall.weights import Stored, WeightStore

CPU = torch.device("cpu")
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
packed = pytest.mark.parametrize(
    "format", [f for f in FORMATS.values() if f.block > 1], ids=lambda f: f.name
)


def matrix(rows: int, cols: int, experts: int = 1, role: str = "layers.0.attention.q") -> p.Matrix:
    return p.Matrix((p.Slice("w", 0, experts * rows),), rows, cols, experts, role)


def stored(format: Format, data: NDArray[np.uint8], cols: int, factor: float = 1.0) -> Checkpoint:
    rows = len(data) // format.row_bytes(cols)
    data.flags.writeable = False  # as a file's pages
    tensor = ByteTensor("w", format.name, (rows, cols), data, factor=factor)
    return Checkpoint(Path(), {}, {"w": tensor}, 0)


def loaded(checkpoint: Checkpoint, weight: p.Matrix, dtype: Any = None, **options: Any) -> Any:
    store = WeightStore(checkpoint, **options)
    made = Matrices.of(store, CPU, dtype or torch.float32)
    made.load([weight], None, None)
    return made.matrix(weight)


def values(tensor: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.float().numpy()
    return found


@formats
@pytest.mark.parametrize("experts", [1, 3])
def test_values_are_those_of_the_file(
    format: Format, experts: int, rng: np.random.Generator
) -> None:
    for rows, blocks in [(1, 1), (5, 2), (17, 3), (33, 5)]:
        cols = blocks * format.block
        data = random_blocks(format, rng, experts * rows * blocks)
        expected = format.dequantize(data).reshape(experts, rows, cols)
        found = loaded(stored(format, data, cols), matrix(rows, cols, experts))
        assert (found.format, found.experts) == (
            "f32" if format.name in FLOATS else format.name,
            experts,
        )
        assert (found.rows, found.cols, found.device) == (rows, cols, CPU)
        for expert in range(experts):
            np.testing.assert_array_equal(values(dense(found, expert)), expected[expert])
        ids = rng.integers(0, rows, 7)
        rows_of_first = values(lookup(found, torch.from_numpy(ids)))
        np.testing.assert_array_equal(rows_of_first, expected[0, ids])


@packed
def test_layout(format: Format, rng: np.random.Generator) -> None:
    """Where every code and scale stands, value by value."""
    rows, cols = 3, 3 * format.block
    data = random_blocks(format, rng, rows * 3)
    found = loaded(stored(format, data, cols), matrix(rows, cols))
    assert isinstance(found, Packed)
    k = np.arange(found.padded)
    codes = plane(found.low, found.low_bits, k)
    if found.high is not None:
        codes |= plane(found.high, found.high_bits, k) << found.low_bits
    value = of_groups(found, found.base, found.part, k) * (codes.astype(np.float32) - found.middle)
    if found.least is not None:
        value -= of_groups(found, found.least, found.less, k)
    np.testing.assert_array_equal(value[:, :cols].reshape(-1), format.dequantize(data))
    assert not value[:, cols:].any()


def plane(found: torch.Tensor, bits: int, k: NDArray[np.int64]) -> NDArray[np.int32]:
    run = 256 // bits
    assert found.shape[2] == len(k) // run * 32
    stored = found[0].numpy()[:, k // run * 32 + k % 32].astype(np.int32)
    codes: NDArray[np.int32] = stored >> (k % run // 32 * bits).astype(np.int32)
    return codes & ((1 << bits) - 1)


def of_groups(
    m: Packed, base: torch.Tensor, part: torch.Tensor | None, k: NDArray[np.int64]
) -> NDArray[np.float32]:
    found = base[0].float().numpy()[:, k // m.base_group]
    if part is None:
        return found
    assert part.dtype in (torch.uint8, torch.int8)
    return found * part[0].float().numpy()[:, k // m.group]


@packed
def test_takes_hardly_more_memory_than_the_file(format: Format, rng: np.random.Generator) -> None:
    data = random_blocks(format, rng, 64 * 512 // format.block)
    found = loaded(stored(format, data, 512), matrix(64, 512))
    most = 1.2 if format.name == "q2_k" else 1.04  # a byte has a scale and a minimum there
    assert found.nbytes <= most * data.nbytes


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("name", FLOATS)
def test_floats_become_those_of_activations(
    name: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    data = random_blocks(FORMATS[name], rng, 5 * 7)
    found = loaded(stored(FORMATS[name], data, 7), matrix(5, 7), dtype)
    assert isinstance(found, Plain)
    assert FLOATS[found.format] == found.values.dtype == dtype
    expected = torch.from_numpy(FORMATS[name].dequantize(data).reshape(1, 5, 7)).to(dtype)
    assert torch.equal(found.values, expected)


def test_float8_has_factors_of_rows(rng: np.random.Generator) -> None:
    format, factor = FORMATS["f8_e4m3"], 0.37
    data = random_blocks(format, rng, 10 * 33)
    weight = matrix(10, 33)
    found = loaded(stored(format, data, 33, factor), weight, torch.bfloat16)
    assert isinstance(found, Float8)
    expected = format.dequantize(data).reshape(10, 33) * np.float32(factor)
    np.testing.assert_array_equal(values(dense(found)), expected)
    exact = loaded(stored(format, data, 33, factor), weight, exact=True)
    assert isinstance(exact, Plain)
    np.testing.assert_array_equal(values(dense(exact)), expected)


@formats
def test_an_exact_store_has_float32(format: Format, rng: np.random.Generator) -> None:
    data = random_blocks(format, rng, 4 * 3)
    found = loaded(stored(format, data, format.block), matrix(6, format.block, 2), exact=True)
    assert isinstance(found, Plain)
    assert found.values.dtype == torch.float32
    np.testing.assert_array_equal(found.values.numpy().reshape(-1), format.dequantize(data))


def test_experts_may_be_stored_in_several_formats(rng: np.random.Generator) -> None:
    tensors, expected = {}, []
    for name in ("q4_k", "q6_k"):
        data = random_blocks(FORMATS[name], rng, 8)
        tensors[name] = ByteTensor(name, name, (8, 256), data)
        expected.append(FORMATS[name].dequantize(data).reshape(8, 256))
    weight = p.Matrix((p.Slice("q4_k", 0, 8), p.Slice("q6_k", 0, 8)), 8, 256, 2)
    found = loaded(Checkpoint(Path(), {}, tensors, 0), weight)
    for expert in range(2):
        np.testing.assert_array_equal(values(dense(found, expert)), expected[expert])


@pytest.mark.parametrize("rows", [3, 300])
def test_large_weights_are_taken_apart_in_runs(
    rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squall.gpu.matrices._CPU_VALUES", 1000)
    for name in ("q4_k", "f16", "f8_e4m3"):
        format = FORMATS[name]
        data = random_blocks(format, rng, 2 * rows * 256 // format.block)
        found = loaded(stored(format, data, 256), matrix(rows, 256, 2))
        both = np.stack([values(dense(found, expert)) for expert in range(2)])
        np.testing.assert_array_equal(both.reshape(-1), format.dequantize(data))


@pytest.mark.parametrize("cols", [256, 96])
@pytest.mark.parametrize("type", TYPES)
def test_quantized_when_loaded(type: str, cols: int, rng: np.random.Generator) -> None:
    """As the native executor quantizes: the same formats, and the same values."""
    checkpoint = in_memory({"w": rng.standard_normal((2 * 17, cols)).astype(np.float32)})
    weights = [matrix(17, cols, 2), matrix(17, cols, 2, "layers.0.ffn.router")]
    store = WeightStore(checkpoint, plan=Plan.of(type))
    made, tiles, pool = (
        Matrices.of(store, CPU, torch.float32),
        Tiles.of(store),
        _native.ThreadPool(2),
    )
    seen: list[tuple[int, int]] = []
    made.load(weights, pool, lambda *progress: seen.append(progress))
    tiles.load(weights, pool, None)
    for weight in weights:
        for expert, tile in enumerate(tiles.matrices(weight)):
            found = values(dense(made.matrix(weight), expert))
            np.testing.assert_array_equal(found, tile.dequantize())
    totals = [
        [(t.format, t.matrices, t.parameters) for t in of.totals(weights)] for of in (made, tiles)
    ]
    assert totals[0] == totals[1]
    assert sum(total.nbytes for total in made.totals(weights)) == sum(
        made.matrix(weight).nbytes for weight in weights
    )
    assert seen[-1][0] == seen[-1][1] == 2 * 2 * 17 * cols * 4


def test_quantized_again_when_loaded(rng: np.random.Generator) -> None:
    data = random_blocks(FORMATS["q8_0"], rng, 16 * 8)
    store = WeightStore(stored(FORMATS["q8_0"], data, 256), plan=Plan.of("q4k"))
    made, tiles, weight = Matrices.of(store, CPU, torch.float32), Tiles.of(store), matrix(16, 256)
    made.load([weight], None, None)
    tiles.load([weight], _native.ThreadPool(1), None)
    np.testing.assert_array_equal(
        values(dense(made.matrix(weight))), tiles.matrix(weight).dequantize()
    )


def test_what_cannot_be_quantized_is_named(rng: np.random.Generator) -> None:
    broken = rng.standard_normal((16, 256)).astype(np.float32)
    broken[3, 4] = np.nan
    with pytest.raises(InvalidCheckpoint, match="cannot convert tensor w: a value is NaN"):
        loaded(in_memory({"w": broken}), matrix(16, 256), plan=Plan.of("q4k"))


def test_weights_are_made_once_for_a_device(rng: np.random.Generator) -> None:
    norm = p.Vector((p.Slice("norm", 0, 8),), 8, 0.5)
    arrays = {"w": rng.standard_normal((4, 8)), "norm": rng.standard_normal(8)}
    checkpoint = in_memory({name: array.astype(np.float32) for name, array in arrays.items()})
    store, weight = WeightStore(checkpoint), matrix(4, 8)
    made = Matrices.of(store, CPU, torch.bfloat16)
    made.load([weight, norm], None, None)
    again = Matrices.of(store, CPU, torch.bfloat16)
    again.load([weight, norm], None, None)
    assert again.matrix(weight) is made.matrix(weight)
    vector = made.vector(norm)
    assert vector is again.vector(norm)
    assert vector is not None
    np.testing.assert_array_equal(values(vector), store.vector(norm))
    assert made.vector(None) is None
    other = Matrices.of(store, CPU, torch.float16)
    assert other is not made


def test_weights_outlive_the_file(rng: np.random.Generator) -> None:
    for name in ("f32", "q8_0", "f8_e4m3"):
        format = FORMATS[name]
        data = random_blocks(format, rng, 4 * 64 // format.block)
        expected = format.dequantize(data).reshape(4, 64)
        found = loaded(stored(format, data, 64), matrix(4, 64))
        data.flags.writeable = True
        data[:] = 0
        np.testing.assert_array_equal(values(dense(found)), expected)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_of_adapters(name: str, rng: np.random.Generator) -> None:
    data = random_blocks(FORMATS[name], rng, 15)
    found = plain(Stored(name, data, None), 3, 5, CPU)
    assert (found.experts, found.rows, found.cols, found.format) == (1, 3, 5, name)
    np.testing.assert_array_equal(values(dense(found)).reshape(-1), FORMATS[name].dequantize(data))
