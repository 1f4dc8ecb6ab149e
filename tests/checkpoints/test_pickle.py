"""PyTorch files against what torch.save was given; and files that would run code: none may."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import resource
import time
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from squall.checkpoints import Tensor, open_checkpoint
from squall.checkpoints.pickle import open_pickle
from squall.errors import InvalidCheckpoint, SquallError, UnsupportedModel

KINDS = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    whole = torch.randn(6, 8)
    tensors = {f"t.{kind}": (torch.randn(3, 5) * 9).to(kind) for kind in KINDS}
    tensors |= {"whole": whole, "rows": whole[2:4], "turned": whole.t(), "column": whole[:, 3]}
    tensors |= {"scalar": torch.tensor(3.5), "parameter": torch.nn.Parameter(torch.ones(2, 2))}
    tensors["one"] = torch.randn(1, 8)[:, ::1]
    return tensors


def check(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = open_pickle(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].format == KINDS[tensor.dtype]
        assert found[name].shape == (tuple(tensor.shape) or (1,))
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert found[name].data.tobytes() == raw.tobytes()
        assert not found[name].data.flags.writeable


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_equals_torch(zipped: bool, protocol: int, tmp_path: Path) -> None:
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    torch.save(state(), tmp_path / "a.bin", **options)
    check(tmp_path / "a.bin", state())


def test_state_dict_of_a_module_with_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    check(tmp_path / "a.pt", module.state_dict())
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "b.pt")
    check(tmp_path / "b.pt", module.state_dict())


def test_contiguous_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.bin")
    found = open_pickle(tmp_path / "a.bin")
    assert np.shares_memory(found["whole"].data, found["rows"].data)
    assert found["turned"].pages is None
    assert found["rows"].pages is not None


def indexed(folder: Path, places: dict[str, str]) -> Mapping[str, Tensor]:
    """The tensors of a folder whose index says this."""
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return open_checkpoint(folder).tensors


def test_parts(tmp_path: Path) -> None:
    places = {}
    for number, names in enumerate((["a", "b"], ["c"]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: torch.full((2,), float(number)) for name in names}, tmp_path / file)
        places |= dict.fromkeys(names, file)
    found = indexed(tmp_path, places)
    assert {name: found[name].to_float32().tolist() for name in found} == {
        "a": [1, 1], "b": [1, 1], "c": [2, 2],
    }  # fmt: skip
    with pytest.raises(InvalidCheckpoint, match=r"'d' is in .*; it is not"):
        indexed(tmp_path, {**places, "d": file})


@pytest.mark.parametrize(
    "name",
    [
        "../a.bin",
        "/etc/passwd",
        "x/a.bin",
        "..",
        "a.bin\0",
        "C:\\a.bin",
        "a.bin\n",
        "-.bin",
        "a.gz",
    ],
)
def test_parts_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="without folders"):
        indexed(tmp_path, {"a": name})


# Files that would harm.


class Trap:
    """Reduces to whatever it was made with."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def proto(text: bytes) -> bytes:
    return b"\x80\x02" + text + b"."


MARKER = "executed"
RUN = f"open({MARKER!r}, 'w').close()"
HARMFUL: dict[str, bytes] = {
    "REDUCE": pickle.dumps({"a": Trap(os.system, (f"touch {MARKER}",))}, 2),
    "eval": pickle.dumps({"a": Trap(builtins.exec, (RUN,))}, 4),
    "REDUCE of getattr": pickle.dumps(Trap(getattr, (os, "system")).reduced[0], 2),
    "BUILD": pickle.dumps(Trap(OrderedDict, (), {"__setstate__": 1, "__class__": 2}), 2)[:-1]
    + b"(K\x01K\x02tb.",
    "BUILD with slots": proto(b"ccollections\nOrderedDict\n)R}N\x86b"),
    "BUILD of a name": proto(b"ctorch\nFloatStorage\n}b"),
    "items by REDUCE": pickle.dumps(Trap(OrderedDict, ([("a", 1)],)), 2),
    "INST": proto(f"(S'touch {MARKER}'\nios\nsystem\n".encode()),
    "INST alone": proto(b"(ios\nsystem\n"),
    "OBJ": proto(b"(cos\nsystem\nX\x02\0\0\0lso"),
    "OBJ alone": proto(b"(X\x02\0\0\0lso"),
    "NEWOBJ": proto(b"ccollections\nOrderedDict\n)\x81"),
    "NEWOBJ_EX": proto(b"ccollections\nOrderedDict\n)}\x92"),
    "EXT1": proto(b"\x82\x01"),
    "EXT2": proto(b"\x83\x01\x00"),
    "EXT4": proto(b"\x84\x01\x00\x00\x00"),
    "STACK_GLOBAL": proto(b"\x8c\x02os\x8c\x06system\x93"),
    "STACK_GLOBAL of numbers": proto(b"K\x01K\x02\x93"),
    "a dotted name": proto(b"\x8c\x0ctorch._utils\x8c\x1a_rebuild_tensor_v2.__call__\x93"),
    "a name across the dot": proto(b"ctorch\n_utils.os.system\n"),
    "calls a storage": proto(b"ctorch\nFloatStorage\n)R"),
    "calls a string": proto(b"X\x01\0\0\0a)R"),
    "load in a storage": proto(b"ctorch.storage\n_load_from_bytes\n(X\x01\0\0\0atR"),
    "sparse": proto(b"ctorch._utils\n_rebuild_sparse_tensor\n)R"),
    "PERSID": proto(b"Pstorage\n"),
    "BINPERSID of a string": proto(b"X\x01\0\0\0aQ"),
    "BINPERSID of a short tuple": proto(b"X\x07\0\0\0storage\x85Q"),
    "BINPERSID of another kind": proto(b"(X\x06\0\0\0modulectorch\nFloatStorage\nX\x01\0\0\0a"
                                       b"X\x03\0\0\0cpuK\x01tQ"),
    "BINPERSID with a huge size": proto(b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0a"
                                        b"X\x03\0\0\0cpu\x8a\x09" + b"\xff" * 8 + b"\x00tQ"),
    "MEMOIZE of nothing": proto(b"\x94"),
    "BINGET of nothing": proto(b"h\x05"),
    "POP of nothing": proto(b"0"),
    "POP past a mark": proto(b"K\x01(0"),
    "TUPLE without a mark": proto(b"t"),
    "TUPLE3 of two": proto(b"K\x01K\x02\x87"),
    "SETITEMS of three": proto(b"}(X\x01\0\0\0aK\x01X\x01\0\0\0bu"),
    "SETITEMS on a list": proto(b"](X\x01\0\0\0aK\x01u"),
    "SETITEM with a number": proto(b"}K\x01K\x02s"),
    "SETITEM with a list": proto(b"}]K\x02s"),
    "APPEND on a dictionary": proto(b"}K\x01a"),
    "LONG1 of 255 bytes": proto(b"\x8a\xff" + b"\x01" * 255),
    "LONG4": proto(b"\x8b\xff\xff\xff\x7f"),
    "a string of 4 GiB": proto(b"X\xff\xff\xff\xff"),
    "BINBYTES8": proto(b"\x8e" + b"\xff" * 8),
    "BINUNICODE8": proto(b"\x8d" + b"\xff" * 8),
    "not UTF-8": proto(b"X\x01\0\0\0\xff"),
    "a name without an end": proto(b"c" + b"x" * 1000),
    "no STOP": b"\x80\x02}",
    "empty": b"",
    "nothing on the stack": proto(b""),
    "a number": proto(b"K\x01"),
    "no tensor": proto(b"}"),
    "no operation": proto(b"\xff"),
    "deep": proto(b"]" * 1_000_000 + b"a" * 999_999),
    "deep tuples": proto(b")" + b"\x85" * 1_000_000),
    "deep marks": proto(b"(" * 1_000_000),
    "memo bomb": proto(b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(1, 100))),
    "many operations": proto(b"N0" * 3_000_000),
    "a huge index of the memo": proto(b"Nr\xff\xff\xff\xff0K\x01"),
    "a byte array of 8 EiB": proto(b"\x96" + b"\xff" * 7 + b"\x7f"),
    "bytes of 4 GiB": proto(b"B\xff\xff\xff\xff"),
    "a frame of 8 EiB": proto(b"\x95" + b"\xff" * 7 + b"\x7f"),
    "a deep key": proto(b"}N" + b"\x85" * 200_000 + b"Ns"),
    "a deep name of a storage": proto(b"N" + b"\x85" * 200_000 + b"Q"),
    "BUILD of a tensor's maker": proto(b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\0\0\0__code__"
                                       b"Ns\x86b"),
    "a number of 2040 bits as a size": proto(
        b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0aX\x03\0\0\0cpu\x8a\xff"
        + b"\x7f" * 255 + b"tQ"),
}  # fmt: skip


def archive(path: Path, data: bytes, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", data)
        made.writestr("archive/data/0", bytes(64))
        for name, content in more.items():
            made.writestr(name.replace("__", "/"), content)
    return path


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.timeout(30)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", HARMFUL)
def test_nothing_runs(
    name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.bin"
    if zipped:
        archive(file, HARMFUL[name])
    else:
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001)]
        head.append(pickle.dumps({"little_endian": True}, 2))
        file.write_bytes(b"".join(head) + HARMFUL[name] + pickle.dumps([], 2))
    memory, start = peak_kib(), time.process_time()
    with pytest.raises(SquallError):
        open_pickle(file)
    assert not Path(MARKER).exists()
    assert peak_kib() - memory < 200 << 10
    assert time.process_time() - start < 5  # one on a machine with nothing else to do


def test_one_of_the_harmful_files_harms_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(HARMFUL["REDUCE"])
    assert Path(MARKER).exists()


def tensor(
    offset: int = 0,
    shape: tuple[int, ...] = (2, 2),
    strides: tuple[int, ...] = (2, 1),
    key: str = "0",
    size: int = 16,
) -> bytes:
    """A pickle of one tensor, with the storage of 64 bytes of `archive`."""
    made = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value[1:] if isinstance(value, tuple) and value[:1] == ("persistent",) else None

    storage = ("persistent", "storage", torch.FloatStorage, key, "cpu", size)
    rebuilt = (storage, offset, shape, strides, False, OrderedDict())
    Pickler(made, 2).dump({"a": Trap(torch._utils._rebuild_tensor_v2, rebuilt)})
    return made.getvalue()


def test_a_tensor_made_by_hand(tmp_path: Path) -> None:
    found = open_pickle(archive(tmp_path / "a.bin", tensor(offset=12)))
    assert found["a"].shape == (2, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 13},
        {"offset": -1},
        {"offset": 1 << 61},
        {"shape": (4, 5)},
        {"shape": (0, 2)},
        {"shape": (-2, -2)},
        {"shape": (1 << 31, 1 << 31)},
        {"shape": (2,)},
        {"shape": (1,) * 9, "strides": (1,) * 9},
        {"strides": (16, 1)},
        {"strides": (-2, 1)},
        {"shape": (1 << 40, 1 << 20), "strides": (0, 0)},
        {"shape": (1000, 2), "strides": (0, 1)},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"size": 3},
        {"offset": 16, "size": 1 << 40},
    ],
)
def test_tensors_stay_in_their_storage(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint):
        open_pickle(archive(tmp_path / "a.bin", tensor(**wrong)))


def test_copies_are_no_larger_than_the_file(tmp_path: Path) -> None:
    whole = torch.randn(100, 100)
    torch.save({str(i): whole.t() for i in range(3)}, tmp_path / "a.bin")
    with pytest.raises(InvalidCheckpoint, match="larger than the file"):
        open_pickle(tmp_path / "a.bin")


def test_archives_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    archive(file, tensor(), archive__byteorder=b"big")
    with pytest.raises(UnsupportedModel, match="big-endian"):
        open_pickle(file)
    archive(file, tensor(), other__data_pkl=b"")
    open_pickle(file)
    with zipfile.ZipFile(file, "a") as made:
        made.writestr("other/data.pkl", b"")
    with pytest.raises(InvalidCheckpoint, match="without one"):
        open_pickle(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", bytes(100 << 20))
    with pytest.raises(UnsupportedModel, match="compressed"):
        open_pickle(file)
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", tensor())
        with pytest.warns(UserWarning, match="Duplicate"):
            made.writestr("archive/data.pkl", tensor())
    with pytest.raises(InvalidCheckpoint, match="twice"):
        open_pickle(file)
    archive(file, tensor(), **{"..__..__escape": b"x", "__absolute": b"x"})
    open_pickle(file)
    assert not (tmp_path / "absolute").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused_or_read(zipped: bool, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "a.bin").read_bytes()
    random = np.random.default_rng(3)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 8):
            damaged[at] = random.integers(256)
        end = len(data) if random.random() < 0.5 else random.integers(len(data))
        (tmp_path / "b.bin").write_bytes(damaged[:end])
        try:
            open_pickle(tmp_path / "b.bin")
        except SquallError:
            refused += 1
    assert refused > 400


def test_other_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(pickle.dumps(1, 2))
    with pytest.raises(UnsupportedModel, match="none that PyTorch wrote"):
        open_pickle(file)
