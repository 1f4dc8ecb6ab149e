"""The type stub of the native module is the one its bindings give; `make stub` writes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from project import PACKAGE


def test_stub_equals_the_generated_one(tmp_path: Path) -> None:
    fresh = tmp_path / "_native.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "squall._native", "-o", fresh]
    subprocess.run(command, check=True)
    assert fresh.read_text() == (PACKAGE / "_native.pyi").read_text()
