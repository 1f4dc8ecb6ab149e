"""What docs/sampling.md says, in the plainest NumPy, float64 and quadratic time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from squall.engine.sampling import Dry, RowSampling, SamplerState, Sampling, sample_rows

Doubles = NDArray[np.float64]


def adjust(
    logits: Doubles, sampling: Sampling, ids: Sequence[int], prompt: int, banned: Sequence[int]
) -> Doubles:
    """Bias, bans, DRY, frequency, presence, repetition. Of finite logits, without breakers' bytes
    that `Breakers.token_bytes` does not know."""
    x = np.array(logits, np.float64)
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    x[list(banned)] = -np.inf
    if sampling.dry is not None and sampling.dry.multiplier > 0:
        for token, length in longest_repeats(ids, sampling.dry).items():
            excess = min(length - sampling.dry.allowed_length, 50)
            x[token] -= sampling.dry.multiplier * sampling.dry.base**excess
    for token, count in Counter(ids[prompt:]).items():
        x[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    for token in set(ids):
        r = sampling.repetition_penalty
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    return x


def breaker_ends(ids: Sequence[int], dry: Dry) -> list[bool]:
    """Of each token whether a breaker ends in it: every place of every text is tried."""
    if dry.breakers is None:
        return [False] * len(ids)
    pieces = [dry.breakers.token_bytes(id_) for id_ in ids]
    stops = np.cumsum([0, *(len(piece) for piece in pieces)])
    text = b"".join(pieces)
    ends = {
        at + len(breaker.encode())
        for breaker in dry.breakers.texts
        for at in range(len(text))
        if text[at:].startswith(breaker.encode())
    }
    return [
        id_ in dry.breakers.ids or any(stops[i] < end <= stops[i + 1] for end in ends)
        for i, id_ in enumerate(ids)
    ]


def longest_repeats(ids: Sequence[int], dry: Dry) -> dict[int, int]:
    """For each token that would continue a repeat: the length of the longest such repeat."""
    first = 0 if dry.range is None else max(0, len(ids) - dry.range)
    ends = breaker_ends(ids, dry)
    found: dict[int, int] = {}
    last = len(ids) - 1
    for i in range(first, last):
        length = 0
        while (
            i - length >= first
            and ids[i - length] == ids[last - length]
            and not ends[i - length]
            and not ends[last - length]
        ):
            length += 1
        if length >= dry.allowed_length and not ends[i + 1]:
            found[ids[i + 1]] = max(length, found.get(ids[i + 1], 0))
    return found


def probabilities(adjusted: Doubles, sampling: Sampling) -> Doubles:
    """Temperature, top-k, top-p, min-p; renormalized at the end."""
    if sampling.temperature == 0:
        return (np.arange(len(adjusted)) == np.argmax(adjusted)).astype(np.float64)
    p = np.exp((adjusted - adjusted.max()) / sampling.temperature)
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def capture(
    logits: NDArray[np.float32],
    options: dict[str, object],
    ids: Sequence[int],
    *,
    prompt: int | None = None,
    banned: Sequence[int] = (),
) -> NDArray[np.float32]:
    """The adjusted logits, as a logits processor sees them."""
    seen: list[NDArray[np.float32]] = []
    keep: Callable[..., None] = lambda x, _: seen.append(x.copy())  # noqa: E731
    state = SamplerState(
        Sampling(**options, logits_processors=(keep,)),  # type: ignore[arg-type]
        ids,
        prompt_length=prompt,
    )
    sample_rows(logits[None], [RowSampling(state, banned)])
    return seen[0]
