"""`bench/vision.py` measures what it says; how much is the machine's affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "vision.py"


@pytest.mark.slow(reason="imports torch, and opens a model three times")
def test_what_is_measured() -> None:
    sizes = {
        "tower-hidden": 128, "tower-layers": 2, "image-size": 56, "hidden": 256, "layers": 2,
        "rounds": 1, "streams": 2, "images": 1, "isq": "Q8_0",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, str(BENCH), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    tower, turns, gap = map(json.loads, done.stdout.splitlines())
    assert min(tower[f"{kind}_s"] for kind in ("floats", "q8_0", "transformers")) >= 0
    assert min(tower[f"{kind}_ratio"] for kind in ("floats", "q8_0")) > 0
    assert turns["read"] == {"new": 1, "again": 0, "text": 0}
    assert min(turns[f"{kind}_ms"] for kind in turns["read"]) > 0
    assert gap["image_ms"]["most"] >= gap["image_ms"]["p99"] >= gap["image_ms"]["median"] > 0
    assert len(gap["first_token_ms"]) == 1
