"""UQFF files made by hand, field by field as the format has them, and broken ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from quant.random_blocks import random_blocks
from squall.checkpoints import open_uqff
from squall.checkpoints.base import Tensor
from squall.errors import InvalidCheckpoint, ModelNotFound, SquallError, UnsupportedModel
from squall.quant import FORMATS

VERSION = 0x000102
ROWS, COLS = 6, 128
BIAS = np.arange(ROWS, dtype=np.float32) / 4
F16, BF16, F32, I32, U8, F8 = 4, 5, 6, 2, 0, 9


def tensor(dtype: int, array: NDArray[np.generic]) -> bytes:
    head = struct.pack("<III", array.nbytes, dtype, array.ndim)
    return head + struct.pack(f"<{array.ndim}I", *array.shape) + array.tobytes()


def ggml(rng: np.random.Generator) -> tuple[bytes, NDArray[np.float32]]:
    values = rng.standard_normal((ROWS, COLS), np.float32)
    kind = gguf.GGMLQuantizationType.Q5_1
    data = gguf.quantize(values, kind)
    blob = struct.pack("<IBIBIIII", VERSION, 0, data.nbytes, 1, 7, 2, ROWS, COLS)
    return blob + data.tobytes() + tensor(F32, BIAS), gguf.dequantize(data, kind)


# A ggml block's dtype in a UQFF file: its number, values and bytes, by the table of the format.
BLOCKS = {
    "f32": (0, 1, 4), "f16": (1, 1, 2), "q4_0": (2, 32, 18), "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22), "q5_1": (7, 32, 24), "q8_0": (8, 32, 34), "q8_1": (9, 32, 36),
    "q2_k": (10, 256, 84), "q3_k": (11, 256, 110), "q4_k": (12, 256, 144), "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210), "q8_k": (15, 256, 292), "bf16": (30, 1, 2),
}  # fmt: skip


def plain(rng: np.random.Generator) -> tuple[bytes, NDArray[np.float32]]:
    values = rng.standard_normal((ROWS, COLS)).astype(np.float16)
    blob = struct.pack("<IBB", VERSION, 1, 1) + tensor(F16, values)
    return blob + tensor(F16, BIAS.astype(np.float16)), values.astype(np.float32)


def fp8(rng: np.random.Generator) -> tuple[bytes, NDArray[np.float32]]:
    import torch

    codes = rng.integers(0, 127, (ROWS, COLS), np.uint8)
    blob = struct.pack("<IBB", VERSION, 3, 0) + tensor(F8, codes)
    blob += struct.pack("<fffI", 0.25, 3.0, 4.0, BF16)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    return blob, values * np.float32(0.25)


def packed(codes: NDArray[np.uint8], bits: int) -> bytes:
    """Rows in words, the first rows in the highest bits, by the table of the format."""
    if bits == 8:
        return tensor(U8, codes)
    shifts = {4: (4, 0), 2: (6, 4, 2, 0), 1: range(7, -1, -1), 3: range(27, -1, -3)}[bits]
    step = -(-len(codes) // len(shifts))
    padded = np.zeros((step * len(shifts), codes.shape[1]), np.int64)
    padded[: len(codes)] = codes
    words = np.zeros((step, codes.shape[1]), np.int64)
    for i, shift in enumerate(shifts):
        words |= padded[i * step : (i + 1) * step] << shift
    return tensor(I32, words.astype("<i4")) if bits == 3 else tensor(U8, words.astype(np.uint8))


def hqq(
    bits: int, axis: int, rows: int = 8, group: int = 64
) -> Callable[[np.random.Generator], tuple[bytes, NDArray[np.float32]]]:
    def make(rng: np.random.Generator) -> tuple[bytes, NDArray[np.float32]]:
        groups = rows * COLS // group
        shape = (group, groups) if axis == 0 else (groups, group)
        codes = rng.integers(0, 1 << bits, shape, np.uint8)
        # So few bits that scale times zero point is a float16, as Squall's blocks want it.
        scales = rng.integers(1, 8, groups).astype(np.float32) / 128
        zeros = rng.integers(0, 1 << bits, groups).astype(np.float32)
        one = (1, groups) if axis == 0 else (groups, 1)
        scales, zeros = scales.reshape(one), zeros.reshape(one)
        blob = struct.pack("<IBB", VERSION, 2, 0) + packed(codes, bits)
        blob += tensor(F32, scales) + tensor(F32, zeros)
        blob += struct.pack("<IIIBIBIBB", 2, rows, COLS, bits, group, axis, 10, 0, 1)
        return blob, ((codes - zeros) * scales).reshape(rows, COLS).astype(np.float32)

    return make


def write(folder: Path, *blobs: bytes, names: tuple[str, ...] = ()) -> Path:
    names = names or tuple(str(i) for i in range(len(blobs)))
    found = {n: np.frombuffer(blob, np.uint8) for n, blob in zip(names, blobs, strict=True)}
    save_file(found, folder / "model.uqff")
    save_file({"model.norm.weight": np.ones(4, np.float32)}, folder / "residual.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder / "model.uqff"


def opened(folder: Path, *blobs: bytes) -> list[Tensor]:
    checkpoint = open_uqff(write(folder, *blobs))
    assert checkpoint.kind == "uqff"
    return [checkpoint.tensors[f"uqff.{i}.weight"] for i in range(len(blobs))]


@pytest.mark.parametrize("make", [ggml, plain, fp8])
def test_golden(
    make: Callable[[np.random.Generator], tuple[bytes, NDArray[np.float32]]],
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    blob, values = make(rng)
    (weight,) = opened(tmp_path, blob)
    assert weight.shape == (ROWS, COLS)
    np.testing.assert_array_equal(weight.to_float32(), values)
    bias = open_uqff(tmp_path / "model.uqff").tensors.get("uqff.0.bias")
    if make is not fp8:
        assert bias is not None
        np.testing.assert_array_equal(bias.to_float32(), BIAS)


@pytest.mark.parametrize("name", BLOCKS)
def test_golden_of_every_ggml_type(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    number, values, size = BLOCKS[name]
    data = random_blocks(FORMATS[name], rng, ROWS * 512 // values)
    assert len(data) == ROWS * 512 // values * size
    head = struct.pack("<IBIBIIII", VERSION, 0, len(data), 0, number, 2, ROWS, 512)
    (weight,) = opened(tmp_path, head + data.tobytes())
    assert (weight.format, weight.shape) == (name, (ROWS, 512))
    np.testing.assert_array_equal(weight.data, data)
    if name not in ("q8_1", "q8_k"):  # which the package cannot read
        exact = gguf.dequantize(data, gguf.GGMLQuantizationType(number)).reshape(ROWS, 512)
        np.testing.assert_array_equal(weight.to_float32(), exact)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_golden_hqq(bits: int, rng: np.random.Generator, tmp_path: Path) -> None:
    """Of axis 1 they stay HQQ; groups across rows, and of other sizes, become float16."""
    made = [hqq(bits, 1)(rng), hqq(bits, 0)(rng), hqq(bits, 1, group=32)(rng)]
    found = opened(tmp_path, *(blob for blob, _ in made))
    assert [weight.format for weight in found] == [f"hqq{bits}", "f16", "f16"]
    for weight, (_, values) in zip(found, made, strict=True):
        atol = np.abs(values).max() * 2**-10
        np.testing.assert_allclose(weight.to_float32(), values, rtol=0, atol=atol)


def test_several_kinds_and_an_older_version(rng: np.random.Generator, tmp_path: Path) -> None:
    made = [ggml(rng), fp8(rng), hqq(4, 1)(rng), plain(rng)]
    blobs = [struct.pack("<I", 0x000100) + blob[4:] for blob, _ in made]
    assert [w.format for w in opened(tmp_path, *blobs)] == ["q5_1", "f8_e4m3", "hqq4", "f16"]


def changed(blob: bytes, at: int, layout: str, value: float) -> bytes:
    new = struct.pack(layout, value)
    return blob[:at] + new + blob[at + len(new) :]


GGML_BLOB = ggml(np.random.default_rng(1))[0]
HQQ_BLOB = hqq(4, 1)(np.random.default_rng(1))[0]
F8_BLOB = fp8(np.random.default_rng(1))[0]
BROKEN = {
    "another major version": (changed(GGML_BLOB, 0, "<I", 0x010000), "UQFF 1.0.0"),
    "an unknown kind": (changed(GGML_BLOB, 4, "<B", 9), "kind 9; known: 0 GGUF"),
    "an absurd length": (changed(GGML_BLOB, 5, "<I", 0xFFFFFFFF), "takes others"),
    "a flag that is none": (changed(GGML_BLOB, 9, "<B", 7), "0 or 1"),
    "an unknown ggml type": (changed(GGML_BLOB, 10, "<I", 99), "ggml id 99"),
    "many dimensions": (changed(GGML_BLOB, 14, "<I", 0xFFFFFFFF), "4294967295 dimensions"),
    "no rows": (changed(GGML_BLOB, 18, "<I", 0), "of the shape"),
    "many rows": (changed(GGML_BLOB, 18, "<I", 0xFFFFFFFF), "takes others"),
    "broken blocks": (changed(GGML_BLOB, 22, "<I", 33), "whole blocks"),
    "nothing": (b"", "cut off"),
    "bytes at the end": (GGML_BLOB + b"x", "1 bytes too many"),
    "a bias of another size": (changed(GGML_BLOB, len(GGML_BLOB) - 28, "<I", 5), "takes others"),
    "HQQ of 5 bits": (changed(HQQ_BLOB, len(HQQ_BLOB) - 12, "<B", 5), "5 bits"),
    "HQQ in groups of 0": (changed(HQQ_BLOB, len(HQQ_BLOB) - 11, "<I", 0), "groups of 0"),
    "HQQ in other groups": (changed(HQQ_BLOB, len(HQQ_BLOB) - 11, "<I", 16), "codes are"),
    "HQQ on axis 2": (changed(HQQ_BLOB, len(HQQ_BLOB) - 7, "<B", 2), "axis 2"),
    "an infinite factor": (changed(F8_BLOB, len(F8_BLOB) - 16, "<f", float("inf")), "factor inf"),
    "an unknown dtype": (changed(F8_BLOB, 10, "<I", 77), "dtype 77"),
}


@pytest.mark.parametrize(("blob", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_broken(blob: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=problem):
        open_uqff(write(tmp_path, blob))


@pytest.mark.parametrize("blob", [GGML_BLOB, HQQ_BLOB, F8_BLOB])
def test_cut_anywhere_and_random_bytes(
    blob: bytes, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Whatever the bytes are: an error of ours, or a weight whose values can be read."""
    for at in [*range(60), *rng.integers(60, len(blob), 20).tolist()]:
        with pytest.raises(SquallError):
            open_uqff(write(tmp_path, blob[:at]))
    for _ in range(150):
        data = bytearray(blob)
        for at in rng.integers(0, 40, 2).tolist() + rng.integers(0, len(blob), 2).tolist():
            data[at] = int(rng.integers(256))
        try:
            (weight,) = opened(tmp_path, bytes(data))
        except SquallError:
            continue
        assert weight.to_float32().shape == weight.shape


def test_numbers_have_no_gaps(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="none of them is 1"):
        open_uqff(write(tmp_path, GGML_BLOB, GGML_BLOB, names=("0", "2")))


def test_what_must_lie_beside(tmp_path: Path) -> None:
    path = write(tmp_path, GGML_BLOB)
    (tmp_path / "residual.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"residual\.safetensors"):
        open_uqff(path)
