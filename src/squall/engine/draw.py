"""The tokens of a step, drawn from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall.engine.sampling import Sampling
from squall.errors import SamplingFailed

Logits = NDArray[np.float32]


class SamplerState:
    """What sampling remembers of one sequence; it is told each token once."""

    def __init__(self, sampling: Sampling, ids: Sequence[int]) -> None:
        self.sampling = sampling
        self.length = len(ids)

    def append(self, token: int) -> None:  # noqa: ARG002
        """The sequence goes on with `token`."""
        self.length += 1


@dataclass(frozen=True, slots=True)
class RowSampling:
    """What to sample from one row of logits.

    top_logprobs: how many of the likeliest to report; None: no log-probabilities at all.
    """

    state: SamplerState
    banned: Sequence[int] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and natural log-probabilities of the model's own distribution if wanted."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def sample_rows(logits: Logits, rows: Sequence[RowSampling]) -> list[Sampled | SamplingFailed]:
    """A token for each row of `logits` `[rows, vocab]`."""
    return [_sample(row_logits, row) for row_logits, row in zip(logits, rows, strict=True)]


def _sample(logits: Logits, row: RowSampling) -> Sampled:
    allowed = logits
    if row.banned:
        allowed = logits.copy()
        allowed[list(row.banned)] = -np.inf
    token = row.state.sampling.pick(allowed, row.state.length)
    if row.top_logprobs is None:
        return Sampled(token, None, ())
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    likeliest = np.argsort(-exact, kind="stable")[: row.top_logprobs]
    return Sampled(token, float(exact[token]), tuple((int(i), float(exact[i])) for i in likeliest))
