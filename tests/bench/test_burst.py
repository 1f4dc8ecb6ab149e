"""`bench/burst.py` measures what it says; how soon is the machine's affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "burst.py"


def test_row_34_four_times_too_many() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH)], capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(done.stdout)
    assert found["statuses"] == {"200": 64, "429": 192}
    assert found["all_say_when"]
    assert found["same_answers"]
    assert 0 < found["refused_ms"]["p50"] <= found["refused_ms"]["p100"]
