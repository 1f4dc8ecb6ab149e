"""`linear` on every instruction set of this machine, for every number format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import linear_reference as reference
import numpy as np
import pytest
from numpy.typing import NDArray

from quant.random_blocks import random_blocks
from squall import _native
from squall.quant import FORMATS, Format

ROWS = (1, 2, 3, 4, 5, 8, 23, 512)
OUTPUTS = (1, 5, 16, 17, 33, 100)
ISAS = _native.isas()
FLOATS = [format for format in FORMATS.values() if format.block == 1]
INTEGERS = [format for format in FORMATS.values() if format.block > 1]

isas = pytest.mark.parametrize("isa", ISAS)


def formats(values: list[Format]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("format", values, ids=lambda format: format.name)


@dataclass(frozen=True)
class Case:
    """One weight, random, and inputs for it."""

    format: Format
    x: NDArray[np.float32]  # [rows, cols]
    weight: NDArray[np.float32]  # [outputs, cols]
    tile: Any

    def linear(self, isa: str, threads: int = 1) -> NDArray[np.float32]:
        return run(self.x, self.tile, isa, threads)

    def __str__(self) -> str:
        rows, (outputs, cols) = len(self.x), self.weight.shape
        return f"{self.format.name}: {rows} rows, {outputs} x {cols}"


def run(x: NDArray[np.float32], tile: Any, isa: str, threads: int = 1) -> NDArray[np.float32]:
    y: NDArray[np.float32] = _native.linear(x, tile, isa, threads)
    assert y.dtype == np.float32
    assert y.shape == (len(x), tile.rows)
    return y


def case(format: Format, rng: np.random.Generator, *, rows: int, outputs: int, cols: int) -> Case:
    data = random_blocks(format, rng, outputs * cols // format.block)
    weight = format.dequantize(data).reshape(outputs, cols)
    x = rng.standard_normal((rows, cols), np.float32)
    x[rng.random(x.shape) < 0.02] *= 20  # outliers, as hidden states have
    return Case(format, x, weight, _native.pack(format.name, data, outputs, cols))


def widths(format: Format) -> tuple[int, ...]:
    if format.block == 1:
        return (1, 3, 17, 33, 100)
    return {
        32: (32, 64, 96, 256, 512),
        64: (64, 128, 192, 512),
        128: (128, 256, 384, 640),
        256: (256, 512, 768),
    }[format.block]


def cases(format: Format, rng: np.random.Generator) -> Iterator[Case]:
    """All numbers of rows with all numbers of outputs; the widths take turns."""
    shapes = zip(product(ROWS, OUTPUTS), cycle(widths(format)), strict=False)
    for (rows, outputs), cols in shapes:
        yield case(format, rng, rows=rows, outputs=outputs, cols=cols)


@isas
@formats(FLOATS)
def test_floats_against_float64(format: Format, isa: str, rng: np.random.Generator) -> None:
    for c in cases(format, rng):
        expected = reference.linear(c.x, c.weight)
        assert reference.relative_error(c.linear(isa), expected, c.x, c.weight) <= 1e-5, str(c)


@formats(INTEGERS)
def test_integers_follow_the_exact_scheme_with_the_same_bytes_on_every_isa(
    format: Format, rng: np.random.Generator
) -> None:
    for c in cases(format, rng):
        found = {isa: c.linear(isa) for isa in ISAS}
        assert len({y.tobytes() for y in found.values()}) == 1, str(c)
        expected = reference.linear(reference.quantize_activations(c.x), c.weight)
        assert reference.nmse(found[ISAS[0]], expected, c.x, c.weight) < 1e-10, str(c)


@isas
@formats(INTEGERS)
def test_integers_against_float64(format: Format, isa: str, rng: np.random.Generator) -> None:
    c = case(format, rng, rows=23, outputs=100, cols=512)
    expected = reference.linear(c.x, c.weight)
    assert reference.nmse(c.linear(isa), expected, c.x, c.weight) < 5e-4


@isas
@formats([*FORMATS.values()])
def test_a_row_alone_equals_the_row_among_others(
    format: Format, isa: str, rng: np.random.Generator
) -> None:
    for outputs, cols in zip((5, 33, 100), widths(format)[::-1], strict=False):
        c = case(format, rng, rows=512, outputs=outputs, cols=cols)
        together = c.linear(isa)
        for row in {0, 1, 7, 8, 511, *rng.integers(0, 512, 16).tolist()}:
            alone = run(c.x[row : row + 1], c.tile, isa)
            assert alone.tobytes() == together[row].tobytes(), f"{c}, row {row}"
        for rows in ROWS:
            start = int(rng.integers(0, 513 - rows))
            some = run(c.x[start : start + rows], c.tile, isa)
            assert some.tobytes() == together[start : start + rows].tobytes(), f"{c}, {rows} of it"


@isas
@formats([*FORMATS.values()])
def test_an_output_does_not_depend_on_its_neighbours(
    format: Format, isa: str, rng: np.random.Generator
) -> None:
    """A matrix packed in two parts gives the same bytes, wherever the cut falls."""
    cols, cut = widths(format)[2], 21
    data = random_blocks(format, rng, 50 * cols // format.block)
    x = rng.standard_normal((9, cols), np.float32)
    whole = run(x, _native.pack(format.name, data, 50, cols), isa)
    at = cut * format.row_bytes(cols)
    parts = [
        run(x, _native.pack(format.name, data[:at], cut, cols), isa),
        run(x, _native.pack(format.name, data[at:], 50 - cut, cols), isa),
    ]
    assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()


@isas
@formats([*FORMATS.values()])
def test_threads_do_not_change_a_bit(format: Format, isa: str, rng: np.random.Generator) -> None:
    for rows, outputs in ((1, 5), (1, 100), (3, 33), (23, 5), (23, 100), (512, 33)):
        c = case(format, rng, rows=rows, outputs=outputs, cols=widths(format)[-1])
        expected = c.linear(isa).tobytes()
        for threads in (2, 3):
            assert c.linear(isa, threads).tobytes() == expected, str(c)


@isas
@formats([*FORMATS.values()])
def test_zero_rows_give_zeros(format: Format, isa: str, rng: np.random.Generator) -> None:
    c = case(format, rng, rows=9, outputs=33, cols=widths(format)[-1])
    c.x[[0, 4, 8]] = 0
    np.testing.assert_array_equal(c.linear(isa)[[0, 4, 8]], 0)


@isas
@formats([*FORMATS.values()])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-45])
def test_a_strange_row_leaves_the_others_alone(
    format: Format, isa: str, value: float, rng: np.random.Generator
) -> None:
    c = case(format, rng, rows=9, outputs=33, cols=widths(format)[-1])
    others = [row for row in range(9) if row not in (2, 5)]
    expected = c.linear(isa)[others].tobytes()
    c.x[2] = value
    c.x[5, 7] = value
    assert c.linear(isa)[others].tobytes() == expected


@isas
@formats([*FORMATS.values()])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, 1e30])
def test_far_magnitudes(
    format: Format, isa: str, magnitude: float, rng: np.random.Generator
) -> None:
    c = case(format, rng, rows=5, outputs=33, cols=widths(format)[-1])
    x = c.x * np.float32(magnitude)
    expected = reference.linear(x, c.weight)
    assert reference.nmse(run(x, c.tile, isa), expected, x, c.weight) < 5e-4


@isas
@formats([*FORMATS.values()])
def test_subnormal_rows_stay_finite(format: Format, isa: str, rng: np.random.Generator) -> None:
    c = case(format, rng, rows=5, outputs=33, cols=widths(format)[-1])
    assert np.isfinite(run(c.x * np.float32(1e-42), c.tile, isa)).all()


@isas
@formats([*FORMATS.values()])
def test_no_rows(format: Format, isa: str, rng: np.random.Generator) -> None:
    c = case(format, rng, rows=1, outputs=17, cols=widths(format)[-1])
    assert run(c.x[:0], c.tile, isa).shape == (0, 17)


@isas
def test_factors_of_rows(isa: str, rng: np.random.Generator) -> None:
    format, rows, cols = FORMATS["f8_e4m3"], 33, 100
    data = random_blocks(format, rng, rows * cols)
    factors = np.exp2(rng.uniform(-30, 30, rows)).astype(np.float32)
    weight = format.dequantize(data).reshape(rows, cols) * factors[:, None]
    tile = _native.pack(format.name, data, rows, cols, factors=factors)
    np.testing.assert_array_equal(tile.dequantize(), weight)
    x = rng.standard_normal((5, cols), np.float32)
    y, expected = run(x, tile, isa), reference.linear(x, weight)
    assert (
        reference.relative_error(y / factors, expected / factors, x, weight / factors[:, None])
        <= 1e-5
    )


@isas
def test_linear_refuses_the_wrong_width(isa: str, rng: np.random.Generator) -> None:
    c = case(FORMATS["q4_0"], rng, rows=1, outputs=17, cols=64)
    with pytest.raises(ValueError, match="columns"):
        _native.linear(np.zeros((1, 32), np.float32), c.tile, isa, 1)


def test_linear_refuses_an_unknown_isa(rng: np.random.Generator) -> None:
    c = case(FORMATS["q4_0"], rng, rows=1, outputs=17, cols=64)
    with pytest.raises(ValueError, match="mmx"):
        _native.linear(c.x, c.tile, "mmx", 1)


def test_isas_end_with_scalar() -> None:
    assert ISAS[-1] == "scalar"
    assert set(ISAS) <= {"avx512", "avxvnni", "avx512bw", "avx2", "dotprod", "neon", "scalar"}
