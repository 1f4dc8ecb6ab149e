"""`squall doctor` tells what it found, whatever is missing."""

from __future__ import annotations

import json

from command import squall

from squall import _native


def test_report() -> None:
    report = json.loads(squall("doctor", "--json").stdout)
    assert report["instructions"].startswith(_native.default_isa())
    assert report["threads"].split()[0].isdigit()
    assert float(report["bandwidth"].split()[0]) > 0
    assert report["default model"].endswith(".gguf")
    assert "numpy" in squall("doctor").stdout


def test_isa_is_honoured() -> None:
    report = json.loads(squall("doctor", "--json", env={"SQUALL_ISA": "scalar"}).stdout)
    assert report["instructions"].startswith("scalar ")


def test_unknown_isa_is_one_line() -> None:
    done = squall("doctor", env={"SQUALL_ISA": "mmx"})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
