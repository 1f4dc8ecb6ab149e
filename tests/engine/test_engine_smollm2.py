"""Real requests, alone and together: the same ids and the same bits of every log-probability."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from squall import EngineConfig, Model
from squall.batch import Batch
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import Sampling

TEXT = "The tide is high when the moon is near, because the water follows it around the earth. "
WORDS = ("tide", "moon", "water", "earth", "high", "near", "stone", "river")

Found = list[tuple[tuple[int, float | None], ...]]


@pytest.fixture(scope="module")
def requests(nightly: bool) -> list[Request]:
    """Greedy and seeded ones, with prompts of 1 to 150 tokens, some of which begin alike."""
    chosen = random.Random(7)
    with Model.open(context=512) as model:
        stem = model.encode(TEXT * 10)
        made = []
        for i in range(32 if nightly else 12):
            own = model.encode(" ".join(chosen.choices(WORDS, k=chosen.randint(1, 30))))
            begin = stem[: chosen.choice([0, 0, 0, 20, 100])]
            sampling = Sampling(temperature=0 if i % 2 else 0.9, top_p=0.95, seed=i)
            options = {"max_tokens": chosen.randint(4, 24), "logprobs": 0, "ignore_eos": True}
            made.append(Request(ids=begin + own, sampling=sampling, **options))
    # The first two outgrow a small cache together.
    for i in range(2):
        made[i] = replace(made[i], ids=stem[i : i + 2], max_tokens=150)
    return made


def results(generation: Generation) -> tuple[tuple[int, float | None], ...]:
    return tuple((s.token, s.logprob) for piece in generation for s in piece.logprobs)


@pytest.fixture(scope="module")
def alone(requests: list[Request]) -> Found:
    found = []
    with Model.open(context=512, engine=EngineConfig(prefix_cache_n=0)) as model:
        for request in requests:
            found.append(results(Generation(model.engine, request)))
            ids = [*request.ids, *(token for token, _ in found[-1])]
            logits = model.logits(ids)[len(request.ids) - 1 : -1].astype(np.float64)
            exact = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            expected = [row[token] for row, (token, _) in zip(exact, found[-1], strict=True)]
            assert [logprob for _, logprob in found[-1]] == pytest.approx(expected, abs=1e-5)
    return found


@pytest.mark.parametrize(
    ("chunk", "kv_tokens"),
    [
        (16, 272), (512, 4096),
        pytest.param(512, 272, marks=pytest.mark.nightly("as long as the others")),
        pytest.param(16, 4096, marks=pytest.mark.nightly("as long as the others")),
    ],
)  # fmt: skip
def test_rows_10_13_together_is_as_alone(
    requests: list[Request],
    alone: Found,
    rng: np.random.Generator,
    chunk: int,
    kv_tokens: int,
) -> None:
    config = EngineConfig(prompt_batchsize=chunk)
    with Model.open(context=256, kv_tokens=kv_tokens, engine=config) as model:
        for _ in ("cold", "warm"):
            order = rng.permutation(len(requests)).tolist()
            generations = {i: Generation(model.engine, requests[i]) for i in order}
            assert [results(generations[i]) for i in range(len(requests))] == alone
        stats = model.engine.stats()
        assert stats.counts.cached_tokens > 0
        assert (stats.preemptions > 0) == (kv_tokens == 272)
        assert stats.blocks_used == 0


def test_guesses_that_are_partly_wrong_give_the_same_bytes(
    requests: list[Request], alone: Found
) -> None:
    """Alone in a step or beside others, preempted, and after prefix hits."""

    def guessing(wanted: Request, found: tuple[tuple[int, float | None], ...]) -> Request:
        known = [*wanted.ids, *(token for token, _ in found)]

        def propose(ids: Sequence[int], most: int) -> list[int]:
            # Every fifth guess is wrong.
            places = range(len(ids), min(len(ids) + most, len(known)))
            return [known[at] + (at % 5 == 0) for at in places]

        return replace(wanted, proposer=propose)

    with Model.open(context=256, kv_tokens=272) as model:
        every, all_there = map(guessing, requests, alone), threading.Event()
        step = model.executor.step

        def waiting(batch: Batch) -> NDArray[np.float32]:
            all_there.wait()
            return step(batch)

        model.executor.step = waiting  # type: ignore[method-assign]
        generations = [Generation(model.engine, wanted) for wanted in every]
        all_there.set()
        assert [results(generation) for generation in generations] == alone
        stats = model.engine.stats()
        assert stats.preemptions > 0
        assert stats.counts.cached_tokens > 0
        assert stats.counts.guessed_tokens > stats.counts.accepted_tokens > 100
        assert stats.counts.steps < stats.counts.answer_tokens / 3
