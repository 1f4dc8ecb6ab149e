"""Rows 4 and 32: a short soak, ten minutes of it at night."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "bench" / "soak.py"


@pytest.mark.slow("clients come and go for so long")
@pytest.mark.timeout(1200)
def test_rows_4_and_32_a_soak(nightly: bool) -> None:
    minutes = 10 if nightly else 1 / 12
    done = subprocess.run(
        [sys.executable, str(SOAK), "--minutes", str(minutes)],
        capture_output=True, text=True, timeout=1000,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert done.returncode == 0, done.stderr
    assert {"200", "400", "429", "left"} <= report.keys()
    # Too short to see a small leak; a large one it sees.
    assert report["grown_bytes"] < 40e6, report
