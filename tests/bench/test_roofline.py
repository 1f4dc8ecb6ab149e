"""`bench/roofline.py`: the form of its report, and that no matmul is faster than the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import roofline
from squall import _native, quant

pytestmark = pytest.mark.serial
SCRIPT = Path(__file__).parents[2] / "bench/roofline.py"
ROWS, SHAPE, PASSES = 32, (256, 512), 2


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    sizes = ["--rows", ROWS, "--shape", *SHAPE, "--passes", PASSES, "--threads", 1, "--json"]
    command = [sys.executable, str(SCRIPT), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_json(report: dict[str, Any]) -> None:
    assert [peak["isa"] for peak in report["peaks"]] == _native.isas()
    assert report["isa"] == _native.default_isa()
    assert report["bandwidth"] > 0
    assert [linear["format"] for linear in report["linears"]] == list(quant.FORMATS)


@pytest.mark.parametrize("isa", _native.isas())
def test_shares(isa: str) -> None:
    int8, float32 = _native.peak_rates(isa, 1)
    peak = {"isa": isa, "int8": int8, "float32": float32}
    for each in roofline.linears(peak, 1, ROWS, SHAPE, PASSES):
        assert each["share"] == each["rate"] / peak[each["bound"]]
        assert 0 < each["share"] < 1.05, each


def test_tables(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    roofline.print_tables(report)
    out = capsys.readouterr().out
    assert "q4_k" in out
    assert "int8 GMAC/s" in out
