"""`bench/roofline.py`: the form of its report, and that no matmul is faster than the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from squall import _native, quant

SCRIPT = Path(__file__).parents[2] / "bench/roofline.py"
SMALL = ("--rows", "32", "--shape", "256", "512", "--passes", "2", "--threads", "1")


def roofline(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("isa", _native.isas())
def test_json(isa: str) -> None:
    report = json.loads(roofline("--isa", isa, "--json"))
    assert [peak["isa"] for peak in report["peaks"]] == _native.isas()
    assert report["bandwidth"] > 0
    assert [linear["format"] for linear in report["linears"]] == list(quant.FORMATS)
    (peak,) = (peak for peak in report["peaks"] if peak["isa"] == isa)
    for linear in report["linears"]:
        assert linear["share"] == linear["rate"] / peak[linear["bound"]]
        assert 0 < linear["share"] < 1.5, linear


def test_tables() -> None:
    out = roofline()
    assert "q4_k" in out
    assert "int8 GMAC/s" in out
