"""Activations of single values, far from 0 and where formulas meet, on every instruction set."""

from __future__ import annotations

import math

import numpy as np
import pytest

from native_executor import in_memory, opened
from squall import _native
from squall.program import Add, Builder


@pytest.mark.parametrize("isa", _native.isas())
def test_gelu(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)
    near = np.linspace(-7, 7, 4096, dtype=np.float32)
    x = np.concatenate([near, np.float32([0.0, -0.0, 1e-30, 40, -40, 1e30, -1e30, np.inf])])
    b = Builder()
    given = b.value("x", 1)
    out = b.emit(Add(b.value("out", 1), given, given, 0.0, activation="gelu"))
    program = b.build(out, inputs=[given])
    executor = opened(program, in_memory({}), {"tokens": len(x)})
    found = executor.run({"x": x[:-1, None]})["out"][:, 0]
    wanted = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x[:-1].astype(float)])
    assert np.all(np.abs(found - wanted) <= 1e-6 * np.maximum(1, np.abs(wanted)))
    assert np.isnan(executor.run({"x": np.float32([[np.nan]])})["out"]).all()
