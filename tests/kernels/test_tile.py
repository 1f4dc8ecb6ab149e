"""Packed weights hold exactly what the file's bytes say."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.random_blocks import random_blocks
from squall import _native
from squall.quant import FORMATS, Format

ROWS = (1, 5, 15, 16, 17, 33, 100)

formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def widths(format: Format) -> tuple[int, ...]:
    if format.block == 1:
        return (1, 3, 16, 17, 33, 100)
    return tuple(format.block * blocks for blocks in (1, 2, 3, 5))


def assert_exact(format: Format, data: NDArray[np.uint8], rows: int, cols: int) -> None:
    tile = _native.pack(format.name, data, rows, cols)
    assert (tile.rows, tile.cols) == (rows, cols)
    actual = tile.dequantize()
    assert actual.dtype == np.float32
    assert actual.shape == (rows, cols)
    expected = format.dequantize(data).reshape(rows, cols)
    np.testing.assert_array_equal(
        actual.view(np.uint32), expected.view(np.uint32), f"{format.name} {rows} x {cols}"
    )


@formats
@pytest.mark.parametrize("rows", ROWS)
def test_dequantize(format: Format, rows: int, rng: np.random.Generator) -> None:
    for cols in widths(format):
        data = random_blocks(format, rng, rows * cols // format.block)
        assert_exact(format, data, rows, cols)


@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1.0, -0.037])
@pytest.mark.parametrize(
    "format", [f for f in FORMATS.values() if f.layout.names], ids=lambda f: f.name
)
def test_dequantize_edge_blocks(format: Format, byte: int, scale: float) -> None:
    rows, cols = 17, format.block
    data = np.full(rows * format.block_bytes, byte, np.uint8)
    for name in {"scale", "minimum", "sum", "zero"} & set(format.layout.names or ()):
        data.view(format.layout)[name] = scale
    assert_exact(format, data, rows, cols)


@formats
def test_dequantize_any_finite_bytes(format: Format, rng: np.random.Generator) -> None:
    """Subnormal scales and floats, and the largest."""
    rows, cols = 33, 256
    data = rng.integers(0, 256, rows * format.row_bytes(cols), np.uint8)
    values = format.dequantize(data).reshape(-1, format.block)
    broken = ~np.isfinite(values).all(axis=1)
    data.reshape(-1, format.block_bytes)[broken] = 0
    assert_exact(format, data, rows, cols)


@formats
def test_packing_costs_little_memory(format: Format, rng: np.random.Generator) -> None:
    rows, cols = 64, 512
    data = random_blocks(format, rng, rows * cols // format.block)
    assert _native.pack(format.name, data, rows, cols).nbytes <= 1.04 * data.nbytes


@formats
def test_tile_does_not_read_the_file_later(format: Format, rng: np.random.Generator) -> None:
    rows, cols = 16, 256
    data = random_blocks(format, rng, rows * cols // format.block)
    expected = format.dequantize(data)
    tile = _native.pack(format.name, data, rows, cols)
    data[:] = 0xA5
    np.testing.assert_array_equal(tile.dequantize().reshape(-1), expected)


@formats
def test_pack_takes_unaligned_read_only_bytes(format: Format, rng: np.random.Generator) -> None:
    rows, cols = 5, 256
    data = random_blocks(format, rng, rows * cols // format.block)
    assert_exact(format, np.frombuffer(b"x" + data.tobytes(), np.uint8)[1:], rows, cols)


@formats
@pytest.mark.parametrize("extra", [-1, 1])
def test_pack_refuses_the_wrong_number_of_bytes(format: Format, extra: int) -> None:
    data = np.zeros(16 * format.row_bytes(256) + extra, np.uint8)
    with pytest.raises(ValueError, match="bytes"):
        _native.pack(format.name, data, 16, 256)


def test_pack_refuses_part_of_a_block() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        _native.pack("q4_0", np.zeros(18, np.uint8), 1, 33)


def test_pack_refuses_an_unknown_format() -> None:
    with pytest.raises(ValueError, match="q9_9"):
        _native.pack("q9_9", np.zeros(18, np.uint8), 1, 32)


def test_pack_refuses_nan() -> None:
    data = np.zeros(16, np.uint8)
    data[5] = 0x7F
    with pytest.raises(ValueError, match="NaN"):
        _native.pack("f8_e4m3", data, 1, 16)


@pytest.mark.parametrize(("format", "factors"), [("f8_e4m3", 2), ("f32", 1)])
def test_pack_refuses_factors_that_do_not_fit(format: str, factors: int) -> None:
    data = np.zeros(FORMATS[format].row_bytes(4), np.uint8)
    with pytest.raises(ValueError, match="factors"):
        _native.pack(format, data, 1, 4, factors=np.ones(factors, np.float32))
