"""`bench/embeddings.py` measures what it says; how fast is the machine's affair."""

from __future__ import annotations

import json

import numpy as np
import pytest

import embeddings  # of bench


def test_sentences_of_all_lengths() -> None:
    lengths = [len(sentence.split()) for sentence in embeddings.sentences(256)]
    assert set(lengths) == set(range(4, 41))


def test_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    unit = np.eye(4, dtype=np.float32)
    found = {name: (lambda: unit) for name in ("squall f32", "squall q8_0", "peer")}
    monkeypatch.setattr(embeddings, "sides", lambda *_: found)
    assert embeddings.main(["--model", "m", "--sentences", "4", "--rounds", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sentences"] == 4
    assert [line.get("least_cosine") for line in report["sides"].values()] == [1.0, 1.0, None]


def test_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "find_spec", lambda _: None)
    assert embeddings.main([]) == 1
