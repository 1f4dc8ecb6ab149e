"""`bench/stalls.py` measures what it says; how much is the machine's affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "stalls.py"


def test_row_33_what_is_measured() -> None:
    command = [sys.executable, str(BENCH), "--streams", "2", "--arrival", "some ids", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    refused, answered = map(json.loads, done.stdout.splitlines())
    assert (refused["status"], answered["status"]) == (400, 200)
    for found in (refused, answered):
        for gaps in (found["calm"], found["disturbed"]):
            assert 0 < gaps["p50"] <= gaps["p99"] <= gaps["p100"]
            assert gaps["min_tokens"] > 0
