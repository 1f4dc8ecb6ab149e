"""How the next token is chosen: checked parameters, and draws keyed by (seed, position)."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall.errors import InvalidRequest

TEMPERATURE = 0.7
TOP_K = 0
TOP_P = 0.95
MIN_P = 0.0
SEED_LIMIT = 2**64


def random_seed() -> int:
    """A seed that is new each time, and short enough to be typed again."""
    return secrets.randbits(32)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Checked parameters. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 are off.

    The same seed gives the same answer, whatever else runs.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    min_tokens: int = 0

    def __post_init__(self) -> None:
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "at least 0")
        _check(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0: off)")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1: off)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1 (0: off)")
        _check(0 <= self.seed < SEED_LIMIT, "seed", self.seed, "at least 0 and below 2**64")

    def pick(self, logits: NDArray[np.float32], position: int) -> int:
        """The token id for `position`, given the logits `[vocab]` of the position before."""
        return _native.sample(
            logits, self.temperature, self.top_k, self.top_p, self.min_p, self.seed, position
        )


def _check(right: bool, name: str, value: float, allowed: str) -> None:
    if not right:
        raise InvalidRequest(f"{name} is {value}; it must be {allowed}")
