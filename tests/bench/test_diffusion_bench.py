"""`bench/diffusion.py` measures what it says; how much is the machine's affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "diffusion.py"


def run(*parts: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCH), "--small", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_prompt_and_steps_of_the_transformer() -> None:
    found, kept, offloaded = run("t5", "step", "offloaded", "--tokens", "40", "--t5-format", "q4_0")
    assert found["part"] == "t5"
    assert found["seconds"] > 0
    assert found["peak_mib"] > found["weights_mib"] > 0
    assert 0 < found["int8_share"] < 2
    assert any("q4_0" in name for name in found["ops"])
    assert kept["weights_mib"] >= 0
    assert 0 < kept["int8_share"] < 2
    assert kept["seconds"] > 0
    assert offloaded["seconds"] > 0
    assert offloaded["peak_mib"] > 0


@pytest.mark.slow(reason="imports diffusers")
def test_a_decoder_beside_diffusers() -> None:
    (found,) = run("decode")
    assert found["speed_ratio"] > 0
    assert found["memory_ratio"] >= 0
    assert found["diffusers"]["peak_mib"] > found["peak_mib"] > 0
    assert any("convolution" in name for name in found["ops"])
