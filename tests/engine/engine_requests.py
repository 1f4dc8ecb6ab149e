"""Requests to an engine on the fake executor, and what their answers have to be."""

from __future__ import annotations

from fake_executor import expected
from invariants import check_scheduler

from squall.engine.engine import Engine
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import RowSampling, Sampled, SamplerState, Sampling, sample_rows

GREEDY = Sampling(temperature=0, seed=0)


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
