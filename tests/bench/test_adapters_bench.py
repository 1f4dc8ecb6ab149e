"""`bench/adapters.py` measures what it says; how much is the machine's affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from random_gguf import Shape, write

BENCH = Path(__file__).parents[2] / "bench" / "adapters.py"


def test_what_is_measured(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    write(model, Shape(2, 256, 512, 4, 2, 400), "q8_0", context=2048)
    few = ("--requests", "3", "--adapters", "2", "--rank", "4", "--rounds", "2", "--loads", "2")
    command = [sys.executable, str(BENCH), str(model), *few, "--tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    many, one, loading = map(json.loads, done.stdout.splitlines())
    assert many["case"] == "3 requests on 2 adapters"
    assert one["case"] == "1 requests on 1 adapters"
    for found in (many, one):
        assert found["without"] > 0
        assert found["with"] > 0
        assert len(found["ratios"]) == 2
        assert min(found["ratios"]) <= found["median"] <= max(found["ratios"])
    assert len(loading["load_ms"]) == 2
    assert min(loading["load_ms"]) > 0
    assert loading["longest_gap_ms"] > 0
    assert loading["adapter_mib"] > 0
