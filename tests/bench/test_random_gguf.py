"""`bench/random_gguf.py` writes files that a model can be opened from."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from squall import Model

BENCH = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "random_gguf.py"))


@pytest.mark.parametrize("format_name", BENCH["WRITABLE"])
def test_a_small_one_answers(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "random.gguf"
    BENCH["write"](path, BENCH["Shape"](1, 256, 512, 4, 2, 400), format_name, context=64)
    with Model.open(path) as model:
        assert model.decode(model.encode('a!"b')) == 'a!"b'
        assert np.isfinite(model.logits(model.encode("!"))).all()
