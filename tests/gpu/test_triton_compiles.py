"""Triton's kernels as compilers make them for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

# Shared memory that a program may have: what cards of 8.6 and 8.9 give, and a Hopper.
ROOM = {80: 99 * 1024, 90: 227 * 1024}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma"}


# By day the likeliest shapes of each kind of kernel.
DAY = r"q4_k of (1|64)|plain of 1$|gated 1 |experts of 512|rms|halves|embed|(attend|store) 128"


def compiled(capability: int, type: str, wanted: str, cache: Path) -> list[dict[str, Any]]:
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, here / "compiling.py", str(capability), type, wanted],
        env=env | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow("compiles twenty kernels; by night seventy")
@pytest.mark.parametrize(
    ("capability", "type"),
    [
        (90, "bf16"),
        pytest.param(80, "bf16", marks=pytest.mark.nightly("as long as the first")),
        pytest.param(90, "f16", marks=pytest.mark.nightly("as long as the first")),
        pytest.param(80, "f16", marks=pytest.mark.nightly("as long as the first")),
    ],
)
def test_kernels(capability: int, type: str, tmp_path: Path, nightly: bool) -> None:
    kernels = compiled(capability, type, "" if nightly else DAY, tmp_path)
    assert {"_product", "_vector", "_rows", "_normalize", "_rotate"} <= {
        kernel["kernel"] for kernel in kernels
    }
    for kernel in kernels:
        few = capability == 80 and kernel["kernel"] == "_walk"  # sums of two kinds fill registers
        assert kernel["spilled"] <= (100 if few else 0), kernel
        assert kernel["shared"] <= ROOM[capability], kernel
        if kernel["kernel"] == "_product":
            used = kernel["multiply"]
            assert used, kernel
            assert all(name.startswith(TENSOR_CORES[capability]) for name in used), kernel
        if kernel["kernel"] in ("_product", "_vector"):
            assert kernel["wide"], kernel  # loads of 16 bytes
    exact = [k for k in kernels if "exact" in k["case"] and k["kernel"] == "_product"]
    assert len({name for kernel in exact for name in kernel["multiply"]}) == 1
    walks = {k["case"]: k["multiply"] for k in kernels if k["kernel"] == "_walk"}
    for dim in (64, 80, 96, 128, 256) if nightly else (128,):
        assert walks[f"attend {dim} of 1 exact"] == walks[f"attend {dim} of 64 exact"]
        assert walks[f"attend {dim} of 64"][0].startswith(TENSOR_CORES[capability])
