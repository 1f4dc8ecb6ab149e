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


def compiled(capability: int, type: str, cache: Path) -> list[dict[str, Any]]:
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, here / "compiling.py", str(capability), type],
        env=env | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow("compiles about sixty kernels")
@pytest.mark.parametrize(
    ("capability", "type"),
    [
        (90, "bf16"),
        pytest.param(80, "bf16", marks=pytest.mark.nightly("as long as the first")),
        pytest.param(90, "f16", marks=pytest.mark.nightly("as long as the first")),
        pytest.param(80, "f16", marks=pytest.mark.nightly("as long as the first")),
    ],
)
def test_kernels(capability: int, type: str, tmp_path: Path) -> None:
    kernels = compiled(capability, type, tmp_path)
    assert {"_product", "_vector", "_rows", "_normalize", "_rotate"} <= {
        kernel["kernel"] for kernel in kernels
    }
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= ROOM[capability], kernel
        if kernel["kernel"] == "_product":
            used = kernel["multiply"]
            assert used, kernel
            assert all(name.startswith(TENSOR_CORES[capability]) for name in used), kernel
        if kernel["kernel"] in ("_product", "_vector"):
            assert kernel["wide"], kernel  # loads of 16 bytes
    exact = [k for k in kernels if "exact" in k["case"] and k["kernel"] == "_product"]
    assert len({name for kernel in exact for name in kernel["multiply"]}) == 1
