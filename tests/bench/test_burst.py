"""`bench/burst.py` measures what it says; how soon is the machine's affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
SIZED = "import burst; burst.RUNNING, burst.WAITING = {}, {}; burst.main()"


def test_row_34_four_times_too_many(nightly: bool) -> None:
    running, waiting = (16, 48) if nightly else (6, 6)
    command = [sys.executable, "-c", SIZED.format(running, waiting)]
    done = subprocess.run(
        command, cwd=BENCH, capture_output=True, text=True, timeout=300, check=True
    )
    found, room = json.loads(done.stdout), running + waiting
    assert found["statuses"] == {"200": room, "429": 3 * room}
    assert found["all_say_when"]
    assert found["same_answers"]
    assert 0 < found["refused_ms"]["p50"] <= found["refused_ms"]["p100"]
