"""Looked up and drafted guesses: they change how long an answer takes, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_requests import Numbers, any_request, idle, request, settle, told
from fake_executor import VOCAB, FakeExecutor, expected
from numpy.typing import NDArray

from squall.engine.draft import Draft
from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.speculation import Cost, Speculation


class Steady(Cost):
    """Always the same, so that tests do not depend on the machine."""

    def __init__(self, fixed: float, row: float) -> None:
        super().__init__()
        super().observe(1, 1.0)
        self.fixed, self.row = fixed, row

    def observe(self, rows: int, seconds: float) -> None:
        """As before."""


def looping(ids: list[int]) -> NDArray[np.float32]:
    """Logits that the last two ids make, so that answers go round."""
    return expected([i % 5 for i in ids[-2:]])


def other(ids: list[int]) -> NDArray[np.float32]:
    """Of a model with other weights."""
    return expected(ids[::-1])


def speculation(executor: FakeExecutor, kind: str) -> Speculation:
    """Guesses that cost next to nothing, so that there are many."""
    draft = None
    if kind != "lookup":
        logits = executor.logits if kind == "perfect" else other
        size = {"blocks": executor.blocks, "max_rows": 16, "context": executor.context}
        draft = Draft(FakeExecutor(logits=logits, max_outputs=16, **size), executor.vocab)
        draft.cost = Steady(1e-6, 1e-6)
    found = Speculation(7, draft)
    found.cost = Steady(1.0, 1e-3)
    return found


@pytest.mark.parametrize("blocks", [14, 64])
@pytest.mark.parametrize("chunk", [7, 32])
@pytest.mark.parametrize("kind", ["lookup", "perfect", "bad"])
@pytest.mark.parametrize("options", [{}, {"prefix_cache_n": 0}])
def test_row_24_guesses_change_nothing(
    rng: np.random.Generator, blocks: int, chunk: int, kind: str, options: dict[str, Any]
) -> None:
    """Ids, text, log-probabilities and ends; batched, chunked, preempted, after prefix hits.

    Greedy and sampled, with penalties, DRY, processors, biases, grammars, stop texts and ids,
    least lengths, the same request with several seeds, and requests that are cancelled or come
    later.
    """
    logits = looping if kind == "lookup" else expected
    stems = rng.integers(VOCAB, size=(3, 30)).tolist()
    # Those that begin grow beyond 14 blocks together.
    wanted = [request([i, 7], max_tokens=25, ignore_eos=True) for i in range(6)]
    wanted += [any_request(rng, stems) for _ in range(30)]
    wanted += [
        replace(wanted[-1], sampling=replace(wanted[-1].sampling, temperature=30, seed=seed))
        for seed in range(3)
    ]
    ends = frozenset({5, 6})
    plain = Engine(
        FakeExecutor(logits=logits), EngineConfig(max_seqs=1), text=Numbers, stop_ids=ends
    )
    right = [told(Generation(plain, one)) for one in wanted]
    plain.close()
    executor = FakeExecutor(blocks=blocks, context=56, max_outputs=24, logits=logits)
    engine = Engine(
        executor, EngineConfig(max_seqs=6, prompt_batchsize=chunk, **options),
        text=Numbers, stop_ids=ends, speculation=speculation(executor, kind),
    )  # fmt: skip
    try:
        for _ in ("cold", "warm"):
            executor.hold()
            generations = [Generation(engine, one) for one in wanted[:20]]
            leaving = Generation(engine, wanted[3])
            executor.let(5)
            executor.wait()
            leaving.close()
            generations += [Generation(engine, one) for one in wanted[20:]]
            executor.let()
            assert [told(generation) for generation in generations] == right
            settle(engine)
            assert idle(engine)
        stats = engine.stats()
        assert stats.preemptions > 0 or blocks > 14
        assert (stats.counts.cached_tokens > 0) == (not options)
        guessed, accepted = stats.counts.guessed_tokens, stats.counts.accepted_tokens
        assert guessed > 100
        assert {"lookup": accepted > 0, "perfect": accepted > guessed * 0.8, "bad": True}[kind]
        assert not engine._stepper._speculation._guessing
    finally:
        engine.close()
