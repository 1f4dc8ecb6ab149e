"""Some fuzzing; `python tests/fuzz/fuzz_gguf.py` does more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_gguf.py")


@pytest.mark.slow("fuzzes for so long")
@pytest.mark.timeout(1200)
def test_fuzzing_finds_nothing(tmp_path: Path, nightly: bool) -> None:
    pytest.importorskip("atheris")
    seconds = 600 if nightly else 5
    command = [sys.executable, str(SCRIPT), "--seconds", str(seconds), "--findings", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not list(tmp_path.iterdir())
