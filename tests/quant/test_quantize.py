"""The native quantizers: how near they come, what they refuse, and what must not change a bit."""

from __future__ import annotations

import hqq_reference
import numpy as np
import pytest
from numpy.typing import NDArray

from squall import _native
from squall.errors import InvalidRequest
from squall.quant import FORMATS, Format

# Root mean square errors of llama.cpp's quantizers on normal random numbers (bench/quantize.py
# measures them, and real weights). Ours must not be worse.
REFERENCE_ERROR = {
    "q2_k": 0.2966,
    "q3_k": 0.1509,
    "q4_k": 0.07143,
    "q5_k": 0.03611,
    "q6_k": 0.01774,
}
MADE = {name: format for name, format in FORMATS.items() if not name.startswith("int")}
BLOCKS = [format for format in MADE.values() if format.block > 1]
HQQ = [8, 4, 3, 2, 1]

blocks = pytest.mark.parametrize("format", BLOCKS, ids=lambda f: f.name)


def normal(rng: np.random.Generator, rows: int, cols: int) -> NDArray[np.float32]:
    return rng.standard_normal((rows, cols), np.float32)


def back(format: Format, x: NDArray[np.float32], **options: object) -> NDArray[np.float32]:
    """What is left of x [rows, cols]."""
    data, _ = _native.quantize(format.name, x, **options)
    return format.dequantize(data).reshape(x.shape)


def rms(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(x.astype(np.float64)))))


@pytest.mark.parametrize("name", REFERENCE_ERROR)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_error_on_normal_numbers(name: str, magnitude: float, rng: np.random.Generator) -> None:
    x = normal(rng, 256, 1024) * np.float32(magnitude)
    assert rms(back(FORMATS[name], x) - x) <= REFERENCE_ERROR[name] * magnitude


@pytest.mark.parametrize("name", REFERENCE_ERROR)
def test_error_on_skewed_numbers(name: str, rng: np.random.Generator) -> None:
    """All of one sign, and with an outlier in each group: still better than 32 values a scale."""
    simple = FORMATS[
        {"q2_k": "hqq2", "q3_k": "hqq3", "q4_k": "q4_1", "q5_k": "q5_1"}.get(name, "q5_0")
    ]
    outliers = normal(rng, 64, 1024)
    outliers[:, ::32] *= 8
    for x in (np.abs(outliers), -np.abs(outliers), outliers):
        assert rms(back(FORMATS[name], x) - x) <= 1.35 * rms(back(simple, x) - x)


def test_q8_1_is_q8_0_with_its_sum(rng: np.random.Generator) -> None:
    x = normal(rng, 50, 256)
    plain = FORMATS["q8_0"].quantize(x.reshape(-1)).view(FORMATS["q8_0"].layout)
    summed = FORMATS["q8_1"].quantize(x.reshape(-1)).view(FORMATS["q8_1"].layout)
    np.testing.assert_array_equal(summed["codes"], plain["codes"])
    np.testing.assert_array_equal(summed["scale"], plain["scale"])
    expected = np.abs(x).reshape(-1, 32).max(axis=1) / np.float32(127) * plain["codes"].sum(axis=1)
    np.testing.assert_array_equal(summed["sum"], expected.astype(np.float16))


def test_q8_k(rng: np.random.Generator) -> None:
    x = normal(rng, 50, 512)
    format = FORMATS["q8_k"]
    found = format.quantize(x.reshape(-1)).view(format.layout)
    error = np.abs(format.dequantize(found.view(np.uint8)) - x.reshape(-1)).reshape(-1, 256)
    assert (error <= np.abs(x).reshape(-1, 256).max(axis=1, keepdims=True) / 254 * 1.0001).all()
    np.testing.assert_array_equal(found["sums"], found["codes"].reshape(-1, 16, 16).sum(axis=2))


@pytest.mark.parametrize("bits", HQQ)
@pytest.mark.parametrize("magnitude", [0.02, 3.0])
def test_hqq_like_its_definition(bits: int, magnitude: float, rng: np.random.Generator) -> None:
    """With large residues, too, where the shrinkage leaves something."""
    x = normal(rng, 40, 256) * np.float32(magnitude)
    x[3, :64] = 0.25
    format = FORMATS[f"hqq{bits}"]
    found = format.quantize(x.reshape(-1))
    codes, scale, zero = hqq_reference.quantize(x, bits)
    middle = 128 if bits == 8 else 0
    stored = found.view(format.layout)
    np.testing.assert_array_equal(stored["scale"], scale.astype(np.float16).reshape(-1))
    minimum = ((middle - zero) * scale).reshape(-1)
    np.testing.assert_allclose(stored["minimum"], minimum, rtol=1e-3, atol=1e-3 * magnitude)
    one, none = stored.copy(), stored.copy()
    one["scale"], one["minimum"], none["scale"], none["minimum"] = 1, 0, 0, 0
    actual = format.dequantize(one.view(np.uint8)).reshape(codes.shape) + middle
    # A value between two codes may go to the other one.
    assert (actual != codes).mean() < 2e-3
    assert np.abs(actual - codes).max() <= 1


@blocks
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.37, 1e-3, 3e4, 65504.0])
def test_constant_rows(format: Format, value: float) -> None:
    x = np.full((3, 2 * format.block), value, np.float32)
    found = back(format, x)
    assert np.isfinite(found).all()
    allowed = 0.12 if format.name in ("q2_k", "q3_k") else 0.04
    np.testing.assert_allclose(found, x, rtol=allowed, atol=1e-5)


@blocks
def test_small_and_large_numbers_together(format: Format, rng: np.random.Generator) -> None:
    x = normal(rng, 40, 512) * np.exp2(rng.uniform(-60, 8, (40, 1))).astype(np.float32)
    x[::5, ::7] = 0
    error = np.abs(back(format, x) - x).max(axis=1)
    steps = {"hqq1": 1, "hqq2": 2, "q2_k": 2, "hqq3": 4, "q3_k": 3}.get(format.name, 6)
    assert (error <= 2 * np.abs(x).max(axis=1) / steps + 3e-4).all()


@blocks
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5])
def test_refuses_what_has_no_scale(format: Format, value: float) -> None:
    x = np.ones(2 * format.block, np.float32)
    x[format.block + 5] = value
    with pytest.raises(InvalidRequest, match="NaN, infinite or above 65504"):
        format.quantize(x)


@blocks
def test_refuses_part_of_a_block(format: Format) -> None:
    with pytest.raises(InvalidRequest, match="whole blocks"):
        format.quantize(np.ones(format.block + 1, np.float32))


@pytest.mark.parametrize("name", REFERENCE_ERROR)
def test_importance(name: str, rng: np.random.Generator) -> None:
    x = normal(rng, 64, 512)
    important = np.ones(512, np.float32)
    important[rng.permutation(512)[:128]] = 50
    plain, fitted = (back(FORMATS[name], x, importance=i) - x for i in (None, important))
    assert rms(fitted[:, important > 1]) < 0.97 * rms(plain[:, important > 1])
    assert np.isfinite(back(FORMATS[name], x, importance=np.zeros(512, np.float32))).all()
    equal = back(FORMATS[name], x, importance=np.full(512, 4, np.float32))
    np.testing.assert_array_equal(equal, back(FORMATS[name], x))


def test_importance_is_a_number_a_column() -> None:
    with pytest.raises(ValueError, match="importance"):
        _native.quantize("q4_k", np.ones((1, 256), np.float32), importance=np.ones(1, np.float32))


@pytest.mark.parametrize("format", MADE.values(), ids=MADE)
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_tiles_hold_what_the_blocks_say(
    format: Format, rows: int, rng: np.random.Generator
) -> None:
    cols = 100 if format.block == 1 else 3 * format.block
    x = normal(rng, rows, cols)
    source = _native.pack("f32", x.view(np.uint8).reshape(-1), rows, cols)
    tile = _native.requantize(source, format.name, _native.ThreadPool(3))
    data, factors = _native.quantize(format.name, x)
    expected = format.dequantize(data).reshape(rows, cols)
    if len(factors):
        expected *= factors[:, None]
    assert tile.format == format.name
    np.testing.assert_array_equal(tile.dequantize(), expected)


def test_f8_uses_its_range(rng: np.random.Generator) -> None:
    x = normal(rng, 20, 99) * np.exp2(rng.uniform(-30, 10, (20, 1))).astype(np.float32)
    data, factors = _native.quantize("f8_e4m3", x)
    np.testing.assert_allclose(factors, np.abs(x).max(axis=1) / 448, rtol=1e-6)
    expected = FORMATS["f8_e4m3"].quantize((x / factors[:, None]).reshape(-1))
    assert (data != expected).mean() < 2e-3  # the division rounds


def test_requantize_names_the_row_it_cannot() -> None:
    x = np.ones((20, 64), np.float32)
    x[17, 3] = np.nan
    source = _native.pack("f32", x.view(np.uint8).reshape(-1), 20, 64)
    with pytest.raises(ValueError, match="row 17"):
        _native.requantize(source, "q4_0")
    with pytest.raises(ValueError, match="multiple of 256"):
        _native.requantize(source, "q4_k")


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - MADE.keys()))
def test_what_files_bring_is_not_made(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"nothing is quantized to {name}"):
        FORMATS[name].quantize(np.ones(FORMATS[name].block, np.float32))
    source = _native.pack("f32", np.zeros(512, np.uint8), 1, 128)
    with pytest.raises(ValueError, match=name):
        _native.requantize(source, name)
