"""Rows 4 and 32: a short soak; `bench/soak.py --minutes 10` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "bench" / "soak.py"
SECONDS = 10


def test_rows_4_and_32_a_soak() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--minutes", str(SECONDS / 60)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert done.returncode == 0, done.stderr
    assert {"200", "400", "429", "left"} <= report.keys()
    # Too short to see a small leak; a large one it sees.
    assert report["grown_bytes"] < 40e6, report
