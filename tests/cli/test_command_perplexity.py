"""`squall perplexity` against its formula, written out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from command import squall

from squall import InvalidRequest, Model
from squall.cli.perplexity import measure

TEXT = "The sea is wide and the ship is small, but the wind is fair and the crew is brave. " * 6


def test_against_the_formula() -> None:
    with Model.open(context=128) as model:
        text = TEXT[: len(TEXT) // 2]
        score = measure(model, text, window=32, stride=8)
        ids = model.encode(text)
        found = []
        for target in range(1, len(ids)):
            # The window that scores a token ends where its stride does.
            stop = 32 if target < 32 else min(32 + math.ceil((target - 31) / 8) * 8, len(ids))
            start = max(stop - 32, 0)
            logits = model.logits(ids[start:target])[-1].astype(np.float64)
            found.append(logits[ids[target]] - np.logaddexp.reduce(logits))
        assert score.scored_tokens == len(found) == len(ids) - 1
        assert math.isclose(score.perplexity, math.exp(-np.mean(found)), rel_tol=1e-9)
        with pytest.raises(InvalidRequest, match="stride is 33"):
            measure(model, TEXT, window=32, stride=33)
        with pytest.raises(InvalidRequest, match="fewer than two tokens"):
            measure(model, "", window=32, stride=8)


def test_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    report = json.loads(squall("perplexity", "--text", str(text), "--json").stdout)
    assert 1 < report["perplexity"] < 30
    assert report["scored_tokens"] == report["tokens"] - 1
    out = squall("perplexity", "--text", str(text)).stdout
    assert out.startswith(f"perplexity {report['perplexity']:.4f}")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    done = squall("perplexity", "--text", str(tmp_path / "missing.txt"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    assert "not UTF-8" in squall("perplexity", "--text", str(latin)).stderr
