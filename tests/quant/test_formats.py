"""Every number format against the gguf package, or a scalar reference where gguf has none."""

from __future__ import annotations

import struct
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from quant.random_blocks import random_blocks
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.quant import FORMATS, UNSUPPORTED, Format, by_ggml_id

# name: (ggml id, values a block, bytes a block), from ggml's public block layouts.
TABLE: dict[str, tuple[int | None, int, int]] = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "bf16": (30, 1, 2),
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "q8_0": (8, 32, 34),
    "q8_1": (9, 32, 36),
    "q2_k": (10, 256, 84),
    "q3_k": (11, 256, 110),
    "q4_k": (12, 256, 144),
    "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210),
    "q8_k": (15, 256, 292),
    "hqq8": (None, 64, 68),
    "hqq4": (None, 64, 36),
    "hqq3": (None, 64, 28),
    "hqq2": (None, 64, 20),
    "hqq1": (None, 64, 12),
    "f8_e4m3": (None, 1, 1),
} | {
    f"int{bits}_g{block}": (None, block, 4 + block)
    for bits in (8, 4, 3, 2)
    for block in (32, 64, 128)
}
INTEGERS = {name for name in TABLE if name.startswith("int")}
LIKE_GGUF = {"f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"}
UNKNOWN_TO_GGUF = {"q8_1", "q8_k", "hqq8", "hqq4", "hqq3", "hqq2", "hqq1", "f8_e4m3"} | INTEGERS

formats = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
in_gguf = pytest.mark.parametrize(
    "format", [FORMATS[name] for name in TABLE if name not in UNKNOWN_TO_GGUF], ids=lambda f: f.name
)

with_scales = pytest.mark.parametrize(
    "format", [f for f in FORMATS.values() if f.layout.names], ids=lambda f: f.name
)


def gguf_dequantize(data: NDArray[np.uint8], format: Format) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return gguf.dequantize(data, GGMLQuantizationType(format.ggml_id)).reshape(-1)


def scalar_dequantize(data: NDArray[np.uint8], format: Format) -> NDArray[np.float32]:
    values: list[np.float32] = []
    for start in range(0, len(data), format.block_bytes):
        block = data[start : start + format.block_bytes].tobytes()
        if format.name.startswith("hqq"):
            values += scalar_hqq(block, int(format.name[3:]))
            continue
        if format.name in INTEGERS:
            values += scalar_integers(block, int(format.name[3]))
            continue
        header, codes = {"q8_1": ("<2e", "<32b"), "q8_k": ("<f", "<256b")}[format.name]
        scale = np.float32(struct.unpack_from(header, block)[0])
        values += [
            scale * np.float32(q) for q in struct.unpack_from(codes, block, struct.calcsize(header))
        ]
    return np.array(values, np.float32)


def scalar_hqq(block: bytes, bits: int) -> list[np.float32]:
    """Planes of 8, 4, 2 or 1 bits, those of each run of bytes after one another; 3 is 2 and 1."""
    scale, minimum = map(np.float32, struct.unpack_from("<2e", block))
    if bits == 8:
        return [scale * np.float32(q) + minimum for q in struct.unpack_from("<64b", block, 4)]

    def plane(width: int, at: int) -> list[int]:
        run = 64 * width // 8
        return [block[at + i % run] >> i // run * width & (1 << width) - 1 for i in range(64)]

    codes = plane(2 if bits == 3 else bits, 4)
    if bits == 3:
        codes = [low | high << 2 for low, high in zip(codes, plane(1, 20), strict=True)]
    return [scale * np.float32(q) + minimum for q in codes]


def scalar_integers(block: bytes, bits: int) -> list[np.float32]:
    scale, zero = map(np.float32, struct.unpack_from("<2e", block))
    return [scale * (np.float32(code % (1 << bits)) - zero) for code in block[4:]]


def torch_dequantize(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    import torch

    values: NDArray[np.float32] = torch.from_numpy(data).view(torch.float8_e4m3fn).float().numpy()
    return values


def reference(data: NDArray[np.uint8], format: Format) -> NDArray[np.float32]:
    if format.name == "f8_e4m3":
        return torch_dequantize(data)
    dequantize = scalar_dequantize if format.name in UNKNOWN_TO_GGUF else gguf_dequantize
    return dequantize(data, format)


def assert_same_bits(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    assert actual.dtype == expected.dtype
    bits = np.dtype(f"u{actual.itemsize}")
    np.testing.assert_array_equal(actual.view(bits), expected.view(bits))


def test_table_holds_every_format_with_its_id_and_sizes() -> None:
    assert {f.name: (f.ggml_id, f.block, f.block_bytes) for f in FORMATS.values()} == TABLE


@formats
def test_dequantize_random_blocks(format: Format, rng: np.random.Generator) -> None:
    data = random_blocks(format, rng, 200)
    assert_same_bits(format.dequantize(data), reference(data, format))


@in_gguf
def test_dequantize_any_bytes(format: Format, rng: np.random.Generator) -> None:
    """Infinite, NaN and subnormal scales too."""
    data = rng.integers(0, 256, 500 * format.block_bytes, np.uint8)
    actual, expected = format.dequantize(data), gguf_dequantize(data, format)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    valid = ~np.isnan(expected)
    assert_same_bits(actual[valid], expected[valid])


@with_scales
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1.0, -0.037])
def test_dequantize_edge_blocks(format: Format, byte: int, scale: float) -> None:
    data = np.full(3 * format.block_bytes, byte, np.uint8)
    for name in {"scale", "minimum", "sum", "zero"} & set(format.layout.names):
        data.view(format.layout)[name] = scale
    assert_same_bits(format.dequantize(data), reference(data, format))


def test_dequantize_hand_made_q4_0() -> None:
    block = struct.pack("<e16B", 0.5, 0xF0, *[0x98] * 15)
    expected = [-4.0, *[0.0] * 15, 3.5, *[0.5] * 15]
    actual = FORMATS["q4_0"].dequantize(np.frombuffer(block, np.uint8))
    np.testing.assert_array_equal(actual, np.array(expected, np.float32))


@formats
def test_dequantize_does_not_depend_on_place(format: Format, rng: np.random.Generator) -> None:
    """Many blocks equal the blocks in two parts, unaligned and read-only."""
    blocks = 150_000 // format.block
    data = random_blocks(format, rng, blocks)
    shifted = np.frombuffer(b"x" + data.tobytes(), np.uint8)[1:]
    cut = blocks // 3 * format.block_bytes
    parts = [format.dequantize(shifted[:cut]), format.dequantize(shifted[cut:])]
    assert_same_bits(format.dequantize(data), np.concatenate(parts))


@formats
def test_dequantize_nothing(format: Format) -> None:
    assert format.dequantize(np.empty(0, np.uint8)).shape == (0,)


@formats
def test_dequantize_refuses_part_of_a_block(format: Format) -> None:
    if format.block_bytes == 1:
        pytest.skip("a byte has no parts")
    with pytest.raises(InvalidCheckpoint, match=f"{format.name} data .* truncated"):
        format.dequantize(np.zeros(format.block_bytes + 1, np.uint8))


@formats
def test_row_bytes(format: Format) -> None:
    assert format.row_bytes(0) == 0
    assert format.row_bytes(256) == 256 // format.block * format.block_bytes


@formats
@pytest.mark.parametrize("cols", [-256, 100])
def test_row_bytes_refuses_part_of_a_block(format: Format, cols: int) -> None:
    if format.block == 1 and cols > 0:
        assert format.row_bytes(cols) == cols * format.block_bytes
        return
    with pytest.raises(InvalidCheckpoint, match="whole blocks"):
        format.row_bytes(cols)


@pytest.mark.parametrize("name", sorted(LIKE_GGUF))
@pytest.mark.parametrize("magnitude", [0.0, 1e-12, 1e-6, 1.0, 1e3])
def test_quantize_like_gguf(name: str, magnitude: float, rng: np.random.Generator) -> None:
    values = (rng.standard_normal(32 * 300) * magnitude).astype(np.float32)
    values[:320] = np.rint(values[:320])  # ties
    values += 0  # which zero of two signs is the least is up to NumPy
    format = FORMATS[name]
    data = format.quantize(values)
    with np.errstate(all="ignore"):
        expected = gguf.quantize(values, GGMLQuantizationType(format.ggml_id))
    assert data.dtype == np.uint8
    assert data.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_quantize_any_float(name: str, rng: np.random.Generator) -> None:
    """NaN stays NaN, infinity stays infinity, and what the format holds comes back unchanged."""
    format = FORMATS[name]
    held = format.dequantize(rng.integers(0, 256, 10_000 * format.block_bytes, np.uint8))
    np.testing.assert_array_equal(format.dequantize(format.quantize(held)), held)
    values = rng.integers(0, 1 << 32, 10_000, np.uint32).view(np.float32)
    back = format.dequantize(format.quantize(values))
    np.testing.assert_array_equal(np.isnan(back), np.isnan(values))


def test_f8_rounds_like_torch(rng: np.random.Generator) -> None:
    import torch

    values = (rng.standard_normal(20_000) * np.exp2(rng.uniform(-12, 8, 20_000))).astype(np.float32)
    held = FORMATS["f8_e4m3"].dequantize(np.arange(126, dtype=np.uint8))
    values = np.clip(np.concatenate([values, (held[1:] + held[:-1]) / 2, held]), -448, 448)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(FORMATS["f8_e4m3"].quantize(values), expected)


def test_by_ggml_id() -> None:
    known = [f for f in FORMATS.values() if f.ggml_id is not None]
    assert [by_ggml_id(f.ggml_id) for f in known] == known


@pytest.mark.parametrize("id", [-1, 42, 1000, *UNSUPPORTED])
def test_by_ggml_id_names_what_it_refuses(id: int) -> None:
    with pytest.raises(UnsupportedModel) as error:
        by_ggml_id(id)
    assert f"{UNSUPPORTED.get(id, 'unknown')} (ggml id {id})" in str(error.value)
    assert all(f.name in str(error.value) for f in FORMATS.values() if f.ggml_id is not None)


def test_every_type_of_gguf_has_a_name() -> None:
    ours = UNSUPPORTED | {f.ggml_id: f.name for f in FORMATS.values()}
    theirs = {int(t): t.name.lower() for t in GGMLQuantizationType}
    assert {id: ours[id] for id in theirs} == theirs
