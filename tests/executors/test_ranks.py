"""Several processes that run one model: what they say, what they sum up, and how they end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import distance
from tiny_models import write_folder, write_gguf
from two_ranks import OPTIONS, TEXT

from squall import Model, embedded, executors
from squall.batch import Batch
from squall.errors import EngineStopped, InvalidRequest
from squall.executors import Limits, Placement
from squall.executors.devices import Stage
from squall.executors.parallel import LeadingExecutor, Ranks
from squall.opening import Opening
from squall.program import Builder

dist = pytest.importorskip("torch.distributed")
SECOND = """
import os, numpy as np, torch
from squall.executors.parallel import Ranks
ranks = Ranks(2, "torch", ())
told, arrays = ranks.hear(0)
for exact in (True, False):
    total = ranks.sum(torch.from_numpy(arrays["x"] * 1e-3), exact=exact)
    ranks.tell([told, exact], {"x": total.numpy(), "none": np.empty((0, 3), np.int32)})
assert ranks.sum(torch.empty(0, 3), exact=True).shape == (0, 3)
ranks.tell({"error": "out of memory"})
os._exit(1)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there had been no other ranks before."""
    for name in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_what_ranks_say_and_sum_and_why_one_ended(rng: np.random.Generator) -> None:
    import torch

    x = rng.normal(size=(5, 7)).astype(np.float32)
    ranks = Ranks(2, "torch", ("-c", SECOND))
    ranks.tell("sum", {"x": x, "more": np.arange(6, dtype=np.int32).reshape(2, 3)})
    for exact in (True, False):
        total = ranks.sum(torch.from_numpy(x.copy()), exact=exact).numpy()
        assert np.array_equal(total, x + x * np.float32(1e-3))
        told, arrays = ranks.hear(1)
        assert told == ["sum", exact]
        assert np.array_equal(arrays["x"], total)
        assert arrays["none"].shape == (0, 3)
    assert ranks.sum(torch.empty(0, 3), exact=True).shape == (0, 3)  # a step with no outputs
    assert ranks.hear(1)[0] == {"error": "out of memory"}
    with pytest.raises(EngineStopped, match="rank 1 of 2 has ended: out of memory"):
        ranks.hear(1)
    with pytest.raises(EngineStopped, match="out of memory"):
        ranks.tell("run")
    assert ranks.lost == "rank 1 of 2 has ended: out of memory"


def test_a_rank_that_ends_before_it_is_here() -> None:
    with pytest.raises(EngineStopped, match="rank 1 of 2 has ended: exit status 3"):
        Ranks(2, "torch", ("-c", "raise SystemExit(3)"))


@pytest.mark.parametrize("device", ["cpu", "mps", "auto", "cuda:0=16;cpu", "cuda:1"])
def test_ranks_are_of_some_devices_only(device: str) -> None:
    with pytest.raises(InvalidRequest, match="ranks run on cuda, or on torch"):
        Ranks(2, device, ("-c", ""))


def test_ranks_are_as_many_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="torchrun --nproc-per-node 2"):
        Model.open(device="torch", tensor_parallel=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InvalidRequest, match="needs as many processes"):
        Ranks(2, "torch", ())


def test_every_rank_has_all_layers() -> None:
    with pytest.raises(InvalidRequest, match="every rank has all layers"):
        Opening(tensor_parallel=2, device_layers="0:16")
    ranks: Any = SimpleNamespace(rank=0, size=2)
    store: Any = None
    placement = Placement((Stage("torch", 1), Stage("cpu")), ranks=ranks)
    with pytest.raises(InvalidRequest, match="every rank has all layers"):
        executors.open(Builder().build(), store, Limits(), placement=placement)


class Told:
    """Ranks to which things are only said."""

    lost = None

    def __init__(self) -> None:
        self.said: list[tuple[str, set[str]]] = []

    def tell(self, told: str, arrays: Any) -> None:
        self.said.append((told, set(arrays)))


def test_the_first_rank_tells_what_it_runs_and_refuses_what_others_cannot() -> None:
    from contextlib import nullcontext

    ranks: Any = Told()
    ranks.together = nullcontext
    program = Builder().build()
    own: Any = SimpleNamespace(
        program=program, placement=Placement((Stage("torch"),), ranks=ranks), vocab=7, _indices=(),
        run=lambda *_: {"logits": np.ones((1, 7), np.float32)}, profile=lambda act: act() or [],
    )  # fmt: skip
    found: Any = LeadingExecutor(own, ranks)
    assert found.placement.ranks is None  # towers are the first rank's alone
    assert found.vocab == 7
    batch = Batch(
        tokens=np.array([3], np.int32), outputs=np.array([0], np.int32),
        positions=np.array([0], np.int32), bounds=np.array([0, 1], np.int32),
        block_tables=np.array([[0]], np.int32),
    )  # fmt: skip
    assert found.step(batch).shape == (1, 7)
    assert found.profile(lambda: found.step(batch) is None) == []
    assert [told for told, _ in ranks.said] == ["run", "profile"]
    assert {"tokens", "at.positions", "at.bounds", "at.block_tables"} <= ranks.said[0][1]
    with pytest.raises(InvalidRequest, match="--merge"):
        found.adapter({})
    with pytest.raises(InvalidRequest, match="keeps its number formats"):
        found.requantize(None)


@pytest.mark.slow("two processes import torch and read a model")
@pytest.mark.parametrize(
    ("name", "weights", "parts"),
    [
        pytest.param("floats", "f32", 2, marks=pytest.mark.nightly("10 s")),
        ("q8_0", "packed", 2),
        ("smollm2", "packed", 3),
    ],
)
def test_two_processes_are_as_one(name: str, weights: Any, parts: int, tmp_path: Path) -> None:
    """parts: of the KV cache, of which the first rank has one; SmolLM2 has three KV heads."""
    path = embedded.find() if name == "smollm2" else write_folder(tmp_path / "model")
    path = write_gguf(tmp_path / "model.gguf", path) if name == "q8_0" else path
    script, out = str(Path(__file__).with_name("two_ranks.py")), tmp_path / "out.npz"
    subprocess.run([sys.executable, script, path, weights, out], check=True, timeout=300)
    found = np.load(out)
    with Model.open(path, weights=weights, **OPTIONS) as model:
        assert distance(found["logits"], model.logits(model.encode(TEXT))) < 1e-5
        assert found["kv_bytes"] * parts == model.executor.kv_bytes
