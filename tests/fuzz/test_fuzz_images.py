"""Some fuzzing of images; `python tests/fuzz/fuzz_images.py` does more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_images.py")


@pytest.mark.slow("fuzzes for so long")
@pytest.mark.timeout(1200)
def test_fuzzing_finds_nothing(tmp_path: Path, nightly: bool) -> None:
    seconds = 600 if nightly else 4
    command = [sys.executable, "-W", "error", SCRIPT, "--seconds", str(seconds)]
    ended = subprocess.run(
        [*command, "--findings", tmp_path], capture_output=True, text=True, timeout=seconds + 60
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "files, of which" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
