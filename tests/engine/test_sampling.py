"""Sampling parameters are checked; the draw itself is native."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from squall.engine.sampling import Sampling
from squall.errors import InvalidRequest

GOOD = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_out_of_range(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(InvalidRequest, match=rf"{name} is {value}"):
        Sampling(**(GOOD | wrong))


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampling = Sampling(**GOOD)
    counts = Counter(sampling.pick(logits, position) for position in range(20000))
    found = np.array([counts[i] for i in range(4)]) / 20000
    assert np.abs(found - [0.5, 0.3, 0.15, 0.05]).max() < 0.015


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        ({"temperature": 0.0}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),
        ({"min_p": 0.25}, {0, 1, 2}),
    ],
)
def test_limits(limit: dict[str, float], allowed: set[int]) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampling = Sampling(**(GOOD | limit))
    assert {sampling.pick(logits, position) for position in range(2000)} == allowed


def test_the_seed_and_the_position_decide() -> None:
    logits = np.zeros(1000, np.float32)
    first = [Sampling(**(GOOD | {"seed": 1})).pick(logits, p) for p in range(50)]
    again = [Sampling(**(GOOD | {"seed": 1})).pick(logits, p) for p in range(50)]
    other = [Sampling(**(GOOD | {"seed": 2})).pick(logits, p) for p in range(50)]
    assert first == again
    assert first != other
    assert len(set(first)) > 40
