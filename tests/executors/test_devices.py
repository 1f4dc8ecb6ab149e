"""What users write about devices, what machines have, and how layers are shared out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import squall
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_folder

from squall import Model, Runner, Which
from squall.assembly import place, prepare
from squall.errors import InvalidRequest, OutOfMemory
from squall.executors import devices
from squall.executors.devices import Placement, chosen, stages_of
from squall.executors.memory import Load, by_memory
from squall.opening import Opening
from squall.quant import Topology

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("llama"), num_hidden_layers=6)


# ---- what users write ----


@pytest.mark.parametrize(
    ("device", "layers", "wanted"),
    [
        ("cpu", None, [("cpu", 6)]),
        ("cuda", None, [("cuda:0", 6)]),
        ("cuda[1]", None, [("cuda:1", 6)]),
        ("metal[0]", None, [("mps", 6)]),
        ("torch=2;cpu", None, [("torch", 2), ("cpu", 4)]),
        ("cuda=2; cuda:1=3 ;cpu", None, [("cuda:0", 2), ("cuda:1", 3), ("cpu", 1)]),
        ("cuda:0=2;cuda:1=3", None, [("cuda:0", 2), ("cuda:1", 3), ("cpu", 1)]),
        ("torch=99;cpu", None, [("torch", 6)]),
        ("torch=0;cpu", None, [("cpu", 6)]),
        ("cpu", 4, [("cuda:0", 4), ("cpu", 2)]),
        ("cpu", "4", [("cuda:0", 4), ("cpu", 2)]),
        ("cpu", 999999, [("cuda:0", 6)]),
        ("cpu", "0", [("cpu", 6)]),
        ("cpu", "0:0", [("cpu", 6)]),
        ("cpu", "1:2;0:3", [("cuda:1", 2), ("cuda:0", 3), ("cpu", 1)]),
        ("cpu", ["0:5", "1:12"], [("cuda:0", 5), ("cuda:1", 1)]),
    ],
)
def test_what_is_meant(device: str, layers: Any, wanted: list[tuple[str, int]]) -> None:
    assert Placement(stages_of(device, layers)).spread(6) == wanted


@pytest.mark.parametrize(
    ("device", "layers", "message"),
    [
        ("gpu", None, "unknown device 'gpu'; devices are cpu, cuda, cuda:N, mps, and torch"),
        ("", None, "unknown device ''"),
        ("cuda:x", None, "unknown device 'cuda:x'"),
        ("mps:1", None, "unknown device 'mps:1'"),
        ("metal[7]", None, "unknown device 'metal"),
        ("torch;cpu", None, "DEVICE=LAYERS;DEVICE"),
        ("torch=a;cpu", None, "DEVICE=LAYERS;DEVICE"),
        ("torch=-1;cpu", None, "DEVICE=LAYERS;DEVICE"),
        ("cpu", "0:4;0:5", "each GPU once"),
        ("cpu", "4;5", "each GPU once"),
        ("cpu", "all", "must be a number of layers, or GPU:LAYERS;GPU:LAYERS"),
        ("cpu", "", "must be a number of layers"),
        ("cpu", -1, "must be a number of layers"),
        ("cuda", 20, "give one of them, such as device='cuda:0=20;cpu'"),
    ],
)
def test_what_means_nothing(device: str, layers: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        stages_of(device, layers)


@pytest.mark.parametrize("layers", [True, 2.5, {"0": 1}])
def test_layers_of_another_kind(layers: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"device_layers is .* it must be 20 or '0:16;1:12'"):
        Opening(device_layers=layers)


@pytest.mark.parametrize("wrong", [{"device": None}, {"exact": None}, {"exact": "no"}], ids=str)
def test_values_of_another_kind(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r" is .*; it must be (text|one of True, False)"):
        Opening(**wrong)


@pytest.mark.parametrize("own", [{"device": "cuda"}, {"device_layers": 2}], ids=str)
def test_drafts_have_no_device_of_their_own(own: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="a draft runs where the model begins"):
        Opening(draft=Opening("small", **own))


@pytest.mark.parametrize(
    ("device", "ranks", "message"),
    [
        ("cuda", 2, "no device cuda:1 here"),
        ("cuda:0", 2**40, "no device cuda:1099511627775 here"),
        ("torch", 1000, "cannot be shared out to 1000 ranks"),
    ],
)
def test_no_rank_is_started_in_vain(
    folder: Path, tmp_path: Path, device: str, ranks: int, message: str
) -> None:
    started = tmp_path / "started"
    command = ("-c", f"open({str(started)!r}, 'w')")
    with pytest.raises(InvalidRequest, match=message):
        Model.open(folder, device=device, tensor_parallel=ranks, command=command)
    assert not started.exists()


def test_a_topology_names_devices() -> None:
    text = "0-2: {device: 'cuda[1]'}\n1-3: {isq: q4k}\n4: {device: cpu}\n5: {device: 'metal[0]'}"
    topology = Topology.from_text(text)
    own = [topology.device_of(layer) for layer in range(6)]
    assert own == ["cuda[1]", None, None, None, "cpu", "metal[0]"]
    placement = Placement(stages_of("cuda")).overridden(["cuda:1", None, None, None, "cpu", "mps"])
    assert placement.spread(6) == [("cuda:1", 1), ("cuda:0", 3), ("cpu", 1), ("mps", 1)]
    assert placement.first.spread(9) == [("cuda:1", 9)]
    assert Placement(stages_of("cuda")).overridden([None] * 6).spread(6) == [("cuda:0", 6)]


# ---- devices that are not there ----


@pytest.mark.parametrize(
    "asked",
    [
        {"device": "cuda"}, {"device": "cuda:3"}, {"device": "mps"}, {"device_layers": 2},
        {"device_layers": "0:2;1:2"}, {"device": "torch=1;cuda:1=1;cpu"},
        {"topology": Topology.from_text("3: {device: 'cuda[0]'}")},
    ],
    ids=str,
)  # fmt: skip
def test_a_device_that_is_not_here_is_an_error(folder: Path, asked: dict[str, Any]) -> None:
    message = r"there is no device (cuda:\d|mps) here: .*PyTorch.*; there are: cpu, torch"
    with pytest.raises(InvalidRequest, match=message):
        Model.open(folder, **asked)


def test_without_pytorch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"pip install 'squall\[torch\]'; there are: cpu$"):
        Model.open(folder, device="cuda")
    assert [device.name for device in devices.available()] == ["cpu"]
    with Model.open(folder, device="auto", context=64) as model:
        assert model.executor.placement.spread(6) == [("cpu", 6)]


def test_a_pytorch_that_is_broken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('no libcudart')")
    code = f"""
import pytest, squall
from squall.executors import devices
devices.has_driver = lambda: True
assert len(devices.available()) == 2
for device in ("cuda", "torch", "torch=1;cpu"):
    with pytest.raises(squall.InvalidRequest, match="loaded: no libcudart; there are: cpu$"):
        squall.Model.open({str(folder)!r}, device=device)
squall.Model.open({str(folder)!r}, device="auto", context=64).close()
"""
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_pytorchs_defaults_are_a_programs_own(tmp_path: Path) -> None:
    """What a program that has PyTorch too says of its own tensors."""
    folder = write_folder(tmp_path, "MixtralForCausalLM", num_local_experts=2, num_hidden_layers=1)

    def logits(isq: str) -> Any:
        with Model.open(folder, device="torch", isq=isq, context=64) as model:
            return model.logits(range(3, 20))

    wanted = [logits("Q4K"), logits("FP8")]
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        found = [logits("Q4K"), logits("FP8")]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    np.testing.assert_array_equal(found, wanted)


def test_runners(folder: Path) -> None:
    which = Which.Plain(str(folder))
    with pytest.raises(InvalidRequest, match="no device cuda:0 here"):
        Runner(which, num_device_layers=["0:2", "1:3"])
    with Runner(which, num_device_layers=["0:0"], context=64) as runner:
        assert runner.model.executor.placement.spread(6) == [("cpu", 6)]
        with pytest.raises(InvalidRequest, match="num_device_layers: the model is open already"):
            Runner(runner.model, num_device_layers=["0:2"])


# ---- machines with GPUs ----


def with_gpus(monkeypatch: pytest.MonkeyPatch, *free: int, cuda: str | None = "13.0") -> None:
    """A machine whose PyTorch finds GPUs with so much free memory, of 80 GiB each."""
    about = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    torch: Any = ModuleType("torch")
    torch.__spec__, torch.__version__ = ModuleSpec("torch", None), "2.11.0"
    torch.version = SimpleNamespace(cuda=cuda, hip=None)
    torch.cuda = SimpleNamespace(
        device_count=lambda: len(free),
        mem_get_info=lambda name: (free[int(name[5:])] - GIB, 80 * GIB),
        memory_reserved=lambda _: 3 * GIB,
        memory_allocated=lambda _: 2 * GIB,
        get_device_properties=lambda _: about,
    )
    torch.backends = SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(devices, "has_driver", lambda: True)


def test_devices_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 79 * GIB, 10 * GIB)
    cpu, torch, *gpus = devices.available()
    assert (cpu.name, torch.name) == ("cpu", "torch")
    capable = "NVIDIA H100, compute capability 9.0"
    assert [
        tuple(getattr(gpu, name) for name in ("name", "total", "free", "description"))
        for gpu in gpus
    ] == [
        ("cuda:0", 80 * GIB, 79 * GIB, capable),
        ("cuda:1", 80 * GIB, 10 * GIB, capable),
    ]
    devices.check("cuda:1")
    with pytest.raises(
        InvalidRequest, match="PyTorch finds 2 CUDA devices; there are: cpu, torch, cuda:0, cuda:1"
    ):
        devices.check("cuda:2")
    with_gpus(monkeypatch, cuda=None)
    with pytest.raises(InvalidRequest, match=r"this PyTorch \(2.11.0\) has no CUDA"):
        devices.check("cuda:0")


def kept(free: int) -> int:
    """What has to be free on a GPU for so much to be used."""
    return int((free + (512 << 20) + 1) / 0.95) + 1


def test_auto_measures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = Opening(folder, device="auto", context=1024)
    model = prepare(opening)
    sizes = place([model], Opening(folder))[1][0]
    whole = sizes.weights + 1024 * sizes.kv

    def layers(*free: int, **changes: Any) -> list[tuple[str, int]]:
        with_gpus(monkeypatch, *free)
        given = Opening(folder, device="auto", context=1024, **changes)
        models = [model] * (1 + (given.draft is not None))
        placement, loads = place(models, given)
        for load in by_memory(loads):
            assert load.weights + 1024 * load.kv <= (load.free or 0), load
        return placement.spread(6)

    assert layers() == [("cpu", 6)]
    assert layers(kept(whole)) == [("cuda:0", 6)]
    assert layers(kept(whole // 9), kept(whole)) == [("cuda:1", 6)]
    assert layers(kept(whole), draft=folder)[-1][0] == "cpu"
    assert layers(kept(2 * whole), draft=folder) == [("cuda:0", 6)]
    device, count = layers(kept(whole // 2))[0]
    assert device == "cuda:0"
    assert 1 <= count < 6
    two = layers(kept(whole * 2 // 3), kept(whole * 2 // 3))
    assert [device for device, _ in two] == ["cuda:0", "cuda:1"]
    device, count = layers(kept(whole), kv_tokens=1500)[0]
    assert device == "cuda:0"
    assert count < 6
    assert layers(1000) == [("cpu", 6)]
    assert layers(kept(whole), topology=Topology.from_text("5: {device: cpu}")) == [("cuda:0", 6)]


def test_context_and_cache_fit_the_fullest_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from squall.assembly import _room

    model = prepare(Opening(folder))
    sizes = place([model], Opening(folder))[1][0]
    with_gpus(monkeypatch, kept(sizes.weights + 1000 * sizes.kv))
    found = _room([model], Opening(folder, device="cuda"), 16)
    assert found.context == 500
    with pytest.raises(OutOfMemory, match=r"memory for 10\d\d tokens"):
        _room([model], Opening(folder, device="cuda", context=2000), 16)
    half = _room([model], Opening(folder, device_layers=3), 16)
    assert half.context > 1000
    with pytest.raises(OutOfMemory, match=r"memory of cuda:0 for \d+ tokens"):
        _room([model], Opening(folder, device_layers=3, context=8000), 16)


def test_the_host_is_one_memory() -> None:
    loads = [Load("torch", 2, 10, 3, 100), Load("cuda:0", 1, 7, 1, 50), Load("cpu", 3, 20, 5, 100)]
    assert by_memory(loads) == [Load("cpu", 5, 30, 8, 100), Load("cuda:0", 1, 7, 1, 50)]


BYTES = st.integers(0, 1000)
GPUS = st.lists(BYTES, max_size=4)


@given(st.lists(BYTES, min_size=1, max_size=12), GPUS, st.integers(0, 300), st.data())
def test_layers_are_shared_out(
    layers: list[int], gpus: list[int], shared: int, data: st.DataObject
) -> None:
    """Never more than is free; all on one if it can be; with more memory no layer less."""
    whole = max(sum(layers) - shared, 0)

    def on_gpus(free: list[int]) -> int:
        named = {f"cuda:{number}": size for number, size in enumerate(free)}
        spread = Placement(chosen(layers, whole, named)).spread(len(layers))
        assert sum(count for _, count in spread) == len(layers)
        at = 0
        for device, count in spread:
            used = whole if count == len(layers) else sum(layers[at : at + count])
            assert used <= named.get(device, used)
            at += count
        if whole <= max(free, default=-1):
            assert len(spread) == 1
        return sum(count for device, count in spread if device != "cpu")

    more = [size + data.draw(BYTES) for size in gpus] + data.draw(GPUS)
    assert on_gpus(gpus) <= on_gpus(more)


# ---- commands ----


def test_commands_say_what_goes_where(folder: Path) -> None:
    device = ("--device", "cpu=2;cpu")
    report = json.loads(squall("inspect", str(folder), *device, "--json").stdout)
    assert [(load["device"], load["layers"]) for load in report["placement"]] == [
        ("cpu", 2),
        ("cpu", 4),
    ]
    size = sum(load["weights"] for load in report["placement"])
    assert abs(size - report["size_bytes"]) < 1000
    # 2 layers of keys and values, 2 heads of 16 values, 2 bytes each
    assert report["placement"][0]["kv"] == 2 * 2 * 2 * 16 * 2
    shown = squall("inspect", str(folder), *device).stdout
    assert "KV of 1,000 tokens" in shown
    assert not json.loads(squall("inspect", str(folder), "--json").stdout)["placement"]
    for empty in (("--device", ""), ("-n", "")):
        assert squall("inspect", str(folder), *empty).returncode == 1
    failed = squall("inspect", str(folder), "-n", "3")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "no device cuda:0 here" in failed.stderr


def test_commands_run_on_several_devices(folder: Path) -> None:
    prompt = ("hello", "--temperature", "0", "--max-tokens", "8", "--context", "256", "--raw")
    split, one = (
        squall("run", *flags, str(folder), *prompt)
        for flags in (("--device", "cpu=2;cpu", "--no-exact"), ("--exact",))
    )
    assert split.returncode == one.returncode == 0, split.stderr
    assert split.stdout == one.stdout
    sizes = ("-p", "8", "-g", "2", "-r", "1", "--json", "--profile")
    report = json.loads(squall("bench", "-m", str(folder), "--device", "cpu=2;cpu", *sizes).stdout)
    assert report["isa"].startswith("2 layers on ")
    assert report["profiles"]
    mixed = squall("run", "--device", "torch=2;cpu", str(folder), *prompt)
    assert mixed.returncode == 0, mixed.stderr
    assert mixed.stdout
    refused = squall("serve", str(folder), "-n", "0:2;1:2", "--port", "0")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "there are: cpu" in refused.stderr


@pytest.mark.parametrize(("rank", "size"), [("one", "x"), ("1", "4")])
def test_ranks_of_other_programs_are_none(folder: Path, rank: str, size: str) -> None:
    done = squall(
        "run", str(folder), "hello", "--max-tokens", "2", "--context", "64", "--raw",
        env={"RANK": rank, "WORLD_SIZE": size},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_cpu_needs_no_pytorch(folder: Path) -> None:
    """Nothing loads torch: neither a model on the CPU, nor what looks for GPUs where none is."""
    code = f"""
import sys, squall
from squall.executors import devices
for device in ("cpu", "auto", "cpu=2;cpu"):
    with squall.Model.open({str(folder)!r}, device=device, context=64, threads=1) as model:
        model.logits([5, 6])
assert devices.has_driver() or "torch" not in sys.modules, sorted(sys.modules)
devices.available()
assert devices.has_driver() or "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
