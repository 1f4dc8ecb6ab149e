"""`bench/load.py`: the stages of a load, and its memory."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_stages_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    random = runpy.run_path(str(BENCH / "random_gguf.py"))
    random["write"](path, random["Shape"](2, 512, 1024, 4, 2, 400), "q4_0", context=64)
    command = [sys.executable, str(BENCH / "load.py"), str(path), "--rounds", "1", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert report["file_bytes"] == path.stat().st_size
    assert report["weight_bytes"] < report["peak_anon_bytes"]
    stages = report["stages_s"]
    for stage in ("import", "header", "recipe", "program", "tokenizer", "weights", "executor"):
        assert stages[stage] > 0
    assert sum(stages.values()) < report["ready_s"]
