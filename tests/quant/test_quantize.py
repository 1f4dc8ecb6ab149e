"""The native quantizers: how near they come, what they refuse, and what must not change a bit."""

from __future__ import annotations

import hqq_reference
import numpy as np
import pytest
from numpy.typing import NDArray

from squall import _native
from squall.errors import InvalidRequest
from squall.quant import FORMATS, Format

# Root mean square errors of llama.cpp's quantizers on `samples`, with default_rng(0); those of
# 32 columns have the same bytes (test_formats). `bench/quantize.py error` measures real weights.
K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
REFERENCE_ERROR = {
    "normal": (0.29692, 0.15036, 0.07129, 0.03603, 0.01768),
    "outliers": (0.60413, 0.36958, 0.17090, 0.08641, 0.05129),
    "positive": (0.45076, 0.36783, 0.14859, 0.07174, 0.05128),
    "negative": (0.46871, 0.36802, 0.13820, 0.07243, 0.05128),
    "heavy tails": (0.48709, 0.26173, 0.12376, 0.06247, 0.03269),
}
MADE = {name: format for name, format in FORMATS.items() if not name.startswith("int")}
BLOCKS = [format for format in MADE.values() if format.block > 1]
HQQ = [8, 4, 3, 2, 1]

blocks = pytest.mark.parametrize("format", BLOCKS, ids=lambda f: f.name)


def normal(rng: np.random.Generator, rows: int, cols: int) -> NDArray[np.float32]:
    return rng.standard_normal((rows, cols), np.float32)


def as_bytes(x: NDArray[np.generic]) -> NDArray[np.uint8]:
    return x.view(np.uint8).reshape(-1)


def back(format: Format, x: NDArray[np.float32], **options: object) -> NDArray[np.float32]:
    """What is left of x [rows, cols]."""
    data, _ = _native.quantize(format.name, x, **options)
    return format.dequantize(data).reshape(x.shape)


def rms(x: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(x.astype(np.float64)))))


def samples() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    plain = normal(rng, 256, 1024)
    outliers = plain.copy()
    outliers[:, ::32] *= 8
    heavy = rng.standard_t(4, (256, 1024)).astype(np.float32)
    positive = np.abs(outliers)
    return {
        "normal": plain, "outliers": outliers, "positive": positive, "negative": -positive,
        "heavy tails": heavy,
    }  # fmt: skip


@pytest.mark.parametrize("source", REFERENCE_ERROR)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_error_at_most_that_of_llama_cpp(source: str, magnitude: float) -> None:
    x = samples()[source] * np.float32(magnitude)
    for name, wanted in zip(K_QUANTS, REFERENCE_ERROR[source], strict=True):
        assert rms(back(FORMATS[name], x) - x) <= wanted * magnitude, name


def test_q8_1_is_q8_0_with_its_sum(rng: np.random.Generator) -> None:
    x = normal(rng, 50, 256)
    plain = FORMATS["q8_0"].quantize(x.reshape(-1)).view(FORMATS["q8_0"].layout)
    summed = FORMATS["q8_1"].quantize(x.reshape(-1)).view(FORMATS["q8_1"].layout)
    np.testing.assert_array_equal(summed["codes"], plain["codes"])
    np.testing.assert_array_equal(summed["scale"], plain["scale"])
    sums = plain["codes"].sum(axis=1).astype(np.float32)
    expected = np.abs(x).reshape(-1, 32).max(axis=1) / np.float32(127) * sums
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
    error = np.abs(stored["minimum"] - minimum)
    far = error > 1e-3 * (np.abs(minimum) + magnitude)
    # A value between two codes may go to the other one, which moves the zero by part of a step.
    assert far.mean() < 2e-2
    assert (error[far] < scale.reshape(-1)[far] / 2).all()
    one, none = stored.copy(), stored.copy()
    one["scale"], one["minimum"], none["scale"], none["minimum"] = 1, 0, 0, 0
    actual = format.dequantize(one.view(np.uint8)).reshape(codes.shape) + middle
    assert (actual != codes).mean() < 2e-3
    assert np.abs(actual - codes).max() <= 1


@blocks
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.37, 1e-3, 3e4, 65504.0])
def test_constant_rows(format: Format, value: float) -> None:
    x = np.full((3, 2 * format.block), value, np.float32)
    found = back(format, x)
    assert np.isfinite(found).all()
    # A block's scale of 1e-3 / 63 or less is subnormal in float16.
    np.testing.assert_allclose(found, x, rtol=1e-3, atol=2.5e-5)


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


@pytest.mark.parametrize("name", K_QUANTS)
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
    for threads in (1, 3):
        place = _native.ThreadPool(threads)
        direct = _native.quantize_tile("f32", as_bytes(x), rows, cols, format.name, place)
        assert direct.data == tile.data


@pytest.mark.parametrize("stored", ["f16", "bf16"])
@pytest.mark.parametrize("to", ["f32", "q4_0", "q4_k", "hqq4"])
def test_rows_of_floats_are_read_as_they_are(
    stored: str, to: str, rng: np.random.Generator
) -> None:
    """Every number of 16 bits, as far as the new format takes it."""
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 256)
    wanted = FORMATS[stored].dequantize(as_bytes(codes)).reshape(codes.shape)
    if to != "f32":
        codes[~(np.abs(wanted) <= 65504)] = 0
    made = _native.quantize_tile(stored, as_bytes(codes), *codes.shape, to)
    if to == "f32":
        np.testing.assert_array_equal(made.dequantize(), wanted)
        return
    source = _native.pack("f32", as_bytes(np.where(codes == 0, 0, wanted)), *codes.shape)
    assert made.data == _native.requantize(source, to).data
    broken = rng.permutation(codes[0])
    broken[7] = 0x7F80 | 0x7C00
    with pytest.raises(ValueError, match="row 0"):
        _native.quantize_tile(stored, as_bytes(broken), 1, 256, "q4_k")


def test_rows_that_are_no_floats() -> None:
    for source, size in (("q4_0", 18), ("f8_e4m3", 32), ("f16", 63), ("f32", 0)):
        with pytest.raises(ValueError, match="f32, f16 or bf16"):
            _native.quantize_tile(source, np.zeros(size, np.uint8), 1, 32, "q8_0")


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
