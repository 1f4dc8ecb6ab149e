"""Safetensors files and folders: what the library writes is read, and what is broken is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from squall.checkpoints import describe, open_checkpoint, read_header
from squall.checkpoints.base import ITEM_BYTES
from squall.checkpoints.safetensors import FORMATS, parse_header
from squall.errors import InvalidCheckpoint, ModelNotFound, SquallError, UnsupportedModel
from squall.files import MAX_JSON_BRACKETS, MAX_JSON_BYTES


def pack(table: Any, data: bytes = b"", *, size: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), start: Any = 0, stop: Any = 8) -> dict[str, Any]:
    offsets = [start, stop]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}


def parse(data: bytes) -> None:
    parse_header(data, "a.safetensors")


def folder(path: Path, **files: bytes) -> Path:
    """Files by name, `__` for a dot."""
    for name, data in ({"config__json": b"{}"} | files).items():
        (path / name.replace("__", ".")).write_bytes(data)
    return path


ONE = pack({"w": entry()}, bytes(8))


def test_what_the_library_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal((3, 5)).astype(np.float32))
    tensors = {
        "f32": values, "f16": values.half(), "bf16": values.bfloat16(), "scalar": torch.ones(()),
        "i32": torch.arange(7, dtype=torch.int32), "fp8": values.to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, folder(tmp_path) / "model.safetensors", {"format": "pt"})
    found = open_checkpoint(tmp_path).tensors
    formats = {name: found[name].format for name in tensors}
    assert formats == {
        "f32": "f32", "f16": "f16", "bf16": "bf16", "scalar": "f32", "i32": "i32",
        "fp8": "f8_e4m3",
    }  # fmt: skip
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        wanted = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(found[name].data, wanted)
    for name in ("f32", "f16", "bf16"):
        np.testing.assert_array_equal(found[name].to_float32(), tensors[name].float().numpy())
    with pytest.raises(UnsupportedModel, match="format i32"):
        found["i32"].check_format()


def test_every_dtype_of_the_table_has_its_size() -> None:
    import torch

    names = {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    words = {"F": "float", "I": "int", "U": "uint", "B": "bfloat"}
    for dtype, format in FORMATS.items():
        name = names.get(dtype, words[dtype[0]] + dtype.lstrip("FIUB"))
        assert getattr(torch, name).itemsize == ITEM_BYTES[format]


T = entry()
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "seven bytes": (bytes(7), "not a safetensors file"),
    "no header": (bytes(8), "not a safetensors file"),
    "length of 2**63": (pack({"w": T}, bytes(8), size=2**63), "not a safetensors file"),
    "length of 2**31": (pack({"w": T}, bytes(8), size=2**31), "not a safetensors file"),
    "longer than the file": (pack({"w": T}, size=1 << 20), "cut off"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "not an object": (pack(b"[1, 2]"), "not a safetensors file"),
    "not json": (pack(b"{nonsense}"), "not JSON"),
    "not utf-8": (pack(b'{"\xff": 1}'), "not JSON"),
    "deep": (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "many lists": (pack(b'{"a":[' + b"[]," * (MAX_JSON_BRACKETS + 1) + b"[]]}"), "limits are"),
    "many digits": (pack(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "twice": (pack(b'{"w": 1, "w": 2}'), "'w' appears twice"),
    "twice inside": (pack(b'{"w": {"shape": [], "shape": [1]}}'), "'shape' appears twice"),
    "metadata": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "no name": (pack({"": T}, bytes(8)), "0 characters"),
    "long name": (pack({"n" * 300: T}, bytes(8)), "300 characters"),
    "not a tensor": (pack({"w": [1]}), "must have dtype"),
    "one key less": (pack({"w": {"dtype": "F32", "shape": []}}), "must have dtype"),
    "one key more": (pack({"w": T | {"stride": 1}}, bytes(8)), "nothing else"),
    "dtype": (pack({"w": entry("F4")}, bytes(8)), "dtype 'F4'"),
    "dtype of a list": (pack({"w": entry(["F32"])}, bytes(8)), "dtype"),
    "negative size": (pack({"w": entry(shape=[-2])}, bytes(8)), "shape"),
    "fraction": (pack({"w": entry(shape=[2.0])}, bytes(8)), "shape"),
    "true": (pack({"w": entry(shape=[True, 2])}, bytes(8)), "shape"),
    "many dims": (pack({"w": entry(shape=[1] * 9 + [2])}, bytes(8)), "shape"),
    "product of 2**64": (pack({"w": entry(shape=[2**32, 2**32])}, bytes(8)), "shape"),
    "wraps to 8 bytes": (pack({"w": entry(shape=[2**62 + 2])}, bytes(8)), "shape"),
    "too few bytes": (pack({"w": entry(stop=7)}, bytes(8)), "7 bytes; F32"),
    "backwards": (pack({"w": entry(start=8, stop=0)}, bytes(8)), "-8 bytes"),
    "negative offset": (pack({"w": entry(start=-8, stop=0)}, bytes(8)), "data_offsets"),
    "three offsets": (pack({"w": T | {"data_offsets": [0, 4, 8]}}, bytes(8)), "data_offsets"),
    "huge offset": (pack({"w": entry(start=2**62, stop=2**62 + 8)}, bytes(8)), "data_offsets"),
    "past the end": (pack({"w": entry(start=4, stop=12)}, bytes(8)), "cut off"),
    "data cut off": (ONE[:-1], "cut off"),
    "overlap": (pack({"a": T, "b": entry(start=4, stop=12)}, bytes(12)), "overlap"),
    "the same place": (pack({"a": T, "b": T}, bytes(8)), "overlap"),
    "hole": (pack({"a": T, "b": entry(start=12, stop=20)}, bytes(20)), "no tensor uses"),
    "bytes before": (pack({"a": entry(start=8, stop=16)}, bytes(16)), "no tensor uses"),
    "bytes after": (pack({"w": T}, bytes(9)), "1 bytes that no tensor uses"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(data: bytes, message: str) -> None:
    with pytest.raises((InvalidCheckpoint, UnsupportedModel), match=message) as caught:
        parse(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@given(st.data())
def test_any_change_is_read_or_refused(data: st.DataObject) -> None:
    good = pack({"a": T, "b": entry("BF16", [3, 1], 8, 14)}, bytes(range(14)))
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(broken[: data.draw(st.integers(0, len(good)))])
    for text in (bytes(broken), cut):
        try:
            entries = parse_header(text, "a")
        except SquallError:
            continue
        assert sum(e.nbytes for e in entries) <= 14


def shards(path: Path, **names: str) -> Path:
    """A tensor each, by its file (`a` to `d` for the numbers)."""
    for tensor, file in names.items():
        (path / f"model-{file}.safetensors").write_bytes(pack({tensor: T}, bytes(8)))
    return folder(path)


def index(path: Path, **weight_map: Any) -> Path:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(text)
    return path


FIRST, SECOND = "00001-of-00002", "00002-of-00002"


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path, a=FIRST, b=SECOND)
    assert open_checkpoint(tmp_path).tensors.keys() == {"a", "b"}
    index(tmp_path, a=f"model-{FIRST}.safetensors", b=f"model-{SECOND}.safetensors")
    found = open_checkpoint(tmp_path)
    assert [part.name for part in found.parts] == [
        f"model-{n}.safetensors" for n in (FIRST, SECOND)
    ]
    assert found.kind == "folder"


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda p: shards(p, b=SECOND), r"parts \[2\] of a model in 2 parts"),
    "two counts": (lambda p: shards(p, a=FIRST, b="00002-of-00003"), "in 2 or 3 parts"),
    "a tensor twice": (
        lambda p: [(shards(p, a=FIRST), (p / f"model-{SECOND}.safetensors").write_bytes(
            pack({"a": T}, bytes(8))))], "'a' is in .* and in"),
    "index without a map": (
        lambda p: (folder(p) / "model.safetensors.index.json").write_bytes(b"{}"), "no weight_map"),
    "index of another tensor": (
        lambda p: index(shards(p, a=FIRST), b=f"model-{FIRST}.safetensors"), "'b' is in"),
    "index of a file that is not there": (
        lambda p: index(folder(p), a="model-x.safetensors"), "there is no file"),
    "config is a list": (lambda p: folder(p, config__json=b"[]", model__safetensors=ONE),
        "not a JSON object"),
    "config is huge": (lambda p: folder(p, config__json=b" " * (MAX_JSON_BYTES + 1)), "limit"),
    "no weights": (lambda p: folder(p), "no weights"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_broken_folders(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises((InvalidCheckpoint, ModelNotFound), match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "a/../../model.safetensors", "/etc/passwd", "..", ".safetensors",
        "sub/model.safetensors", "model.safetensors\0", "\\model.safetensors", "model.bin", "", 3,
        ["model.safetensors"],
    ],
)  # fmt: skip
def test_an_index_stays_in_its_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(ONE)
    inner = tmp_path / "inner"
    inner.mkdir()
    index(folder(inner), w=name)
    with pytest.raises(InvalidCheckpoint, match="only plain names"):
        open_checkpoint(inner)


def test_description(tmp_path: Path) -> None:
    config = b'{"hidden_size": 4, "rope_scaling": {"factor": 2}, "x": null, "eos": [1, "\\u001b"]}'
    folder(tmp_path, config__json=config, model__safetensors=ONE)
    found = describe(read_header(tmp_path))
    assert [str(field) for field in found.metadata] == [
        "4", '{"factor": 2}', "null", "text[2] 1, \\x1b"
    ]  # fmt: skip
    assert (found.kind, found.parameters, found.tensors[0].format) == ("folder", 2, "f32")
