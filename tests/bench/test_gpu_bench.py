"""`bench/gpu.sh` in miniature on the CPU, and what its table and bench/scaling.py's say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_steps
import scaling

SCRIPT = Path(__file__).parents[2] / "bench/gpu.sh"


def run(out: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), "--small", *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable} | env,
    )  # fmt: skip


@pytest.mark.slow("several processes load PyTorch")
def test_in_miniature(tmp_path: Path, nightly: bool) -> None:
    steps = () if nightly else ("ceilings", "q4_k", "scaling", "llama.cpp")
    done = run(tmp_path, *steps)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["ends"].values()) == {"ok"}, (tmp_path / "log").read_text()
    rows = {row["name"]: row for row in found["rows"]}
    for name in ("q4_k exact", "q4_k", *(("bf16 exact", "bf16") if nightly else ())):
        one, together = rows[f"{name}: 1 sequence"], rows[f"{name}: 8 sequences"]
        assert one["share"] == pytest.approx(one["bytes"] / 1e9 / rows["copy"]["value"])
        assert together["share"] == pytest.approx(together["value"] / one["value"])
        assert rows[f"{name}: prompt, 64 a step"]["share"] > 0
        assert f"{name}: 1 sequence" in done.stdout
    assert rows["CPU tiny Q4_K, best: 1 sequence"]["least"] == 0.85
    if nightly:
        assert rows["transformers bf16: prompt"]["value"] > 0
        assert rows["tests passed"]["value"] > 0
        assert "q4_k, pp64: " in (tmp_path / "log").read_text()


def test_steps_have_their_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, "ceilings", "tests", SQUALL_GPU_S="1")
    assert done.returncode == 0, done.stderr
    assert "ceilings: no time left; tests: no time left" in done.stdout
    with (tmp_path / "log").open("wb") as log:
        assert gpu_steps.run_step("ceilings", 0.01, log) == ([], "no end within 0 s")
        monkeypatch.setattr(sys, "executable", "/bin/false")
        assert gpu_steps.run_step("ceilings", 10, log) == ([], "failed (1)")


def test_an_unknown_step(tmp_path: Path) -> None:
    done = run(tmp_path, "ceiling")
    assert done.returncode == 2
    assert "unknown: ceiling; steps are ceilings, " in done.stderr


def test_rows_that_fall_short_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"step": "ceilings", "name": "copy", "value": 3000.0, "unit": "GB/s"},
        {"step": "q4_k", "name": "a", "value": 9.0, "unit": "", "bytes": 1.5e12, "least": 0.6},
        {"step": "q4_k", "name": "b", "value": 9.0, "unit": "", "bytes": 2.4e12, "least": 0.6},
    ]
    gpu_steps.print_table(gpu_steps.with_shares(rows), {})
    short, enough = capsys.readouterr().out.splitlines()[2:4]
    assert short.split() == ["a", "9", "0.50", "0.60", "MISSED"]
    assert enough.split() == ["b", "9", "0.80", "0.60"]


def test_shares_of_threads() -> None:
    assert scaling.doubled(1) == [1]
    assert scaling.doubled(6) == [1, 2, 4, 6]
    assert scaling.doubled(16) == [1, 2, 4, 8, 16]
    line: dict[str, Any] = {"model": "m", "bytes": 10}
    one = line | {"bandwidth": 100.0, "prompt": 5.0, "answer": 4.0, "together": 3.0}
    two = line | {"bandwidth": 80.0, "prompt": 9.0, "answer": 9.0, "together": 6.0}
    peer = {"model": "m, llama.cpp", "prompt": 2.0, "answer": 1.0, "together": 1.0}
    found = scaling.compared([one, two, peer])
    assert [(line.get("of_bound"), line["x"], line["x16"]) for line in found] == [
        (0.4, 1.0, 1.0), (0.9, 1.8, 2.0), (None, 1.0, 1.0),
    ]  # fmt: skip
