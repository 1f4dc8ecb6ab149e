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
    peak = {"isa": isa, "int8": 0.0, "float32": 0.0}
    for _ in range(5):  # a machine that was busy with others had a higher peak than it showed
        for bound, rate in zip(("int8", "float32"), _native.peak_rates(isa, 1), strict=True):
            peak[bound] = max(peak[bound], rate)
        linears = roofline.linears(peak, 1, ROWS, SHAPE, PASSES)
        assert all(each["share"] == each["rate"] / peak[each["bound"]] > 0 for each in linears)
        too_fast = [each for each in linears if each["share"] >= 1.5]
        if not too_fast:
            break
    assert not too_fast


def test_tables(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    roofline.print_tables(report)
    out = capsys.readouterr().out
    assert "q4_k" in out
    assert "int8 GMAC/s" in out
