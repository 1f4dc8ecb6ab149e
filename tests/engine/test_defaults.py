"""Sampling parameters of generation_config.json, below the caller's and above Squall's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from squall.engine.defaults import GenerationDefaults
from squall.engine.sampling import Sampling
from squall.errors import InvalidCheckpoint

SEED = {"seed": 1}


def read(folder: Path, **config: Any) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return GenerationDefaults.from_folder(folder)


def test_nothing_is_said(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "none", Path(__file__)):
        assert GenerationDefaults.from_folder(where).sampling(SEED) == Sampling(seed=1)


def test_the_caller_then_the_file_then_squall(tmp_path: Path) -> None:
    found = read(tmp_path, temperature=0.6, top_k=20, repetition_penalty=1.1, top_p=None, eos=3)
    given = {"temperature": 0.0, "top_k": None, **SEED}
    assert found.sampling(given) == Sampling(0.0, top_k=20, repetition_penalty=1.1, seed=1)
    assert found.sampling(SEED).temperature == 0.6


def test_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, do_sample=False, temperature=0.6).sampling(SEED).temperature == 0
    assert read(tmp_path, do_sample=True, temperature=0.6).sampling(SEED).temperature == 0.6


@pytest.mark.parametrize(
    "config", [{"temperature": -1}, {"top_p": "1"}, {"top_k": True}, {"top_p": 2}]
)
def test_what_cannot_be_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json"):
        read(tmp_path, **config)
