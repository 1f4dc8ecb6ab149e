"""Requests to an engine on the fake executor, and what their answers have to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from fake_executor import VOCAB, expected
from invariants import check_scheduler

from squall.engine.engine import Engine
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import (
    Breakers,
    Dry,
    RowSampling,
    Sampled,
    SamplerState,
    Sampling,
    sample_rows,
)

GREEDY = Sampling(temperature=0, seed=0)
Told = tuple[str, list[int], list[object], str | None]


class Numbers:
    """Text of tokens: their numbers; a token below 5 waits for the next. "13" stops."""

    def __init__(self, request: Request) -> None:
        self.stopped = False
        self._stop = request.stop
        self._held = ""

    def push(self, token: int) -> str:
        self.stopped = str(token) in self._stop
        text, self._held = self._held + f"{token} ", ""
        if token < 5:
            text, self._held = "", text
        return "" if self.stopped else text

    def finish(self) -> str:
        return "" if self.stopped else self._held


def request(ids: list[int], **options: object) -> Request:
    given = {"sampling": GREEDY, "max_tokens": 10} | options
    return Request(ids=ids, **given)  # type: ignore[arg-type]


def alone(wanted: Request) -> list[int]:
    """What the answer has to be, by definition."""
    ids = list(wanted.ids)
    state = SamplerState(wanted.sampling, ids)
    for _ in range(wanted.max_tokens or 0):
        (sampled,) = sample_rows(expected(ids)[None], [RowSampling(state)])
        assert isinstance(sampled, Sampled)
        state.append(sampled.token)
        ids.append(sampled.token)
    return ids[len(wanted.ids) :]


def idle(engine: Engine) -> bool:
    """Nothing is left of any request."""
    stats = engine.stats()
    if engine.alive:
        check_scheduler(engine._scheduler)
    return (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def settle(engine: Engine) -> None:
    """Wait until a request that comes now is answered; what was cancelled before is gone then."""
    Generation(engine, request([0], max_tokens=1)).read()


def told(generation: Generation) -> Told:
    """All that is told of an answer, however it was cut into pieces."""
    pieces = list(generation)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    logprobs = [sampled for piece in pieces for sampled in piece.logprobs]
    text = "".join(piece.text for piece in pieces)
    return text, [i for piece in pieces for i in piece.ids], logprobs, pieces[-1].finish_reason


def avoid_the_last(logits: np.ndarray, ids: np.ndarray) -> None:
    logits[ids[-1]] -= 20


class Follows:
    """A matcher: what must not come after the ids of an answer; `end` ends it."""

    def __init__(self, banned: Callable[[Sequence[int]], Any], end: int | None = None) -> None:
        self.finished = False
        self._banned = banned
        self._end = end
        self._ids: list[int] = []

    def allowed(self, guesses: Sequence[int]) -> list[np.ndarray]:
        known = [[*self._ids, *guesses[:i]] for i in range(len(guesses) + 1)]
        return [mask(set(range(VOCAB)) - {*self._banned(ids)}) for ids in known]

    def forced(self, most: int) -> list[int]:  # noqa: ARG002
        return []

    def accept(self, token: int) -> None:
        self._ids.append(token)
        self.finished = token == self._end


def mask(ids: Iterable[int]) -> np.ndarray:
    bits = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def odd() -> Follows:
    return Follows(lambda _: range(0, VOCAB, 2))


def other_parity() -> Follows:
    """An id must be even after an odd one, and the other way round."""
    return Follows(lambda ids: range(ids[-1] % 2, VOCAB, 2) if ids else ())


def any_request(rng: np.random.Generator, stems: list[list[int]]) -> Request:
    """One that uses what there is, by chance."""

    def sometimes(value: Any, otherwise: Any) -> Any:
        return otherwise if rng.integers(3) else value

    breakers = Breakers(("7",), lambda token: str(token).encode())
    sampling = Sampling(
        temperature=float(rng.integers(3)),
        top_p=0.9,
        seed=int(rng.integers(9)),
        frequency_penalty=sometimes(1.0, 0.0),
        repetition_penalty=sometimes(1.2, 1.0),
        dry=sometimes(Dry(2.0, breakers=breakers), None),
        min_tokens=sometimes(9, 0),
        logits_processors=sometimes((avoid_the_last,), ()),
        logit_bias=sometimes({3: 20.0}, {}),
    )
    return request(
        stems[rng.integers(3)][: rng.integers(31)] + rng.integers(VOCAB, size=2).tolist(),
        max_tokens=int(rng.integers(1, 16)),
        sampling=sampling,
        logprobs=sometimes(2, None),
        stop=sometimes(("13", "50"), ()),
        stop_ids=frozenset(rng.integers(VOCAB, size=sometimes(10, 0)).tolist()),
        ignore_eos=sometimes(True, False),
        chunk=sometimes(3, None),
        constraint=sometimes(other_parity, None),
    )
