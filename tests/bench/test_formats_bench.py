"""`bench/formats.py`: models of a number format that are in no file."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from squall.quant import FORMATS

BENCH = Path(__file__).parents[2] / "bench"
SMALL = ("--shape", "135m", "--rounds", "1", "-p", "8", "-g", "2")


def formats(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "formats.py"), *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.serial
def test_a_line_for_each_format() -> None:
    names = ("q4_0", "hqq3", "int8_g64", "f8_e4m3")
    random = runpy.run_path(str(BENCH / "random_gguf.py"))
    sizes = [size for _, *size in random["matrices"](random["SHAPES"]["135m"])]
    lines = formats("--json", *names).stdout.splitlines()
    assert [json.loads(line)["format"] for line in lines] == list(names)
    for name, line in zip(names, lines, strict=True):
        row = json.loads(line)
        stored = sum(rows * FORMATS[name].row_bytes(cols) for rows, cols in sizes)
        assert 1 <= row["MiB"] * 2**20 / stored < 1.04
        assert 0 < row["of peak"] < 1.5
        # The bound is that of memory; a cache that holds the weights gives them faster.
        assert row["of bound"] > 0


def test_an_unknown_format() -> None:
    refused = formats("q4_9")
    assert refused.returncode == 2
    assert "q4_9: not one of f32," in refused.stderr
