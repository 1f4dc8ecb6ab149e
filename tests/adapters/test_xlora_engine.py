"""X-LoRA under the engine: an answer is the same bytes however its steps are cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
from engine_requests import Numbers, Told, told
from xlora_models import MODULES, case, make, opened

from squall.adapters.xlora import TwoPasses
from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import Sampling

CONFIG = {"xlora_depth": 2, "xlora_size": 24, "layerwise_scalings": True, "top_k_lora": 2}
ALONE = EngineConfig(max_seqs=1, prefix_cache_n=0)


@pytest.fixture(scope="module", params=[None, 3], ids=["granular", "settling"])
def executor(request: Any, tmp_path_factory: pytest.TempPathFactory) -> TwoPasses:
    """One with too few blocks for all requests at a time."""
    root, model = tmp_path_factory.mktemp("xlora"), tiny.build(case("llama"))
    model.save_pretrained(root / "base")
    made = make(model, MODULES["llama"], root / "mixed", **CONFIG)
    settles = {"tgt_non_granular_index": request.param}
    return opened(root / "base", made.folder, exact=False, **settles)


def asked() -> list[Request]:
    """Prompts that begin alike, and others, of many lengths; greedy and drawn."""
    rng, found = np.random.default_rng(11), []
    stem = rng.integers(3, 160, 40).tolist()
    for number in range(8):
        ids = [*stem[: 5 * number], *rng.integers(3, 160, number % 3 + 1).tolist()]
        sampling = Sampling(temperature=number % 2 * 0.8, seed=number)
        found.append(Request(ids=ids, sampling=sampling, max_tokens=22, logprobs=2))
    return found


def answers(
    executor: TwoPasses, requests: Sequence[Request], config: EngineConfig | None = None
) -> list[Told]:
    """Of requests that come at once."""
    engine = Engine(executor, config, text=Numbers)
    try:
        return [told(one) for one in [Generation(engine, request) for request in requests]]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def alone(executor: TwoPasses) -> list[Told]:
    """Each for itself, in a new engine, its prompt in one step."""
    return [answers(executor, [request], ALONE)[0] for request in asked()]


def test_together_and_preempted(executor: TwoPasses, alone: list[Told]) -> None:
    engine, begun = Engine(executor, text=Numbers), list[Generation]()
    # Between two steps, so that they come in the same.
    engine.change_model(lambda: begun.extend(Generation(engine, one) for one in asked()))
    assert [told(one) for one in begun] == alone
    assert engine.stats().preemptions > 0
    engine.close()


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked(executor: TwoPasses, alone: list[Told], chunk: int) -> None:
    assert answers(executor, [replace(one, chunk=chunk) for one in asked()]) == alone


def test_computed_anew_in_each_step(executor: TwoPasses, alone: list[Told]) -> None:
    assert answers(executor, asked(), EngineConfig(no_kv_cache=True)) == alone


def test_cached(executor: TwoPasses, alone: list[Told]) -> None:
    engine = Engine(executor, text=Numbers)
    for turn in range(3):
        found = []
        for request in asked():
            generation = Generation(engine, request)
            found.append(told(generation))
            if turn and len(request.ids) > 17:
                assert generation.usage.cached_tokens >= 16
        assert found == alone
    engine.close()


def test_chats_go_on(executor: TwoPasses, alone: list[Told]) -> None:
    """What was an answer is a prompt now, and is weighed as one."""
    engine = Engine(executor, EngineConfig(max_seqs=1), text=Numbers)
    for request, (_, ids, *_) in zip(asked(), alone, strict=True):
        told(Generation(engine, request))
        longer = replace(request, ids=[*request.ids, *ids[:-1], 9], max_tokens=3)
        if len(longer.ids) < 60:
            assert told(Generation(engine, longer)) == answers(executor, [longer], ALONE)[0]
    engine.close()


def test_guessed(executor: TwoPasses, alone: list[Told]) -> None:
    known = {tuple(request.ids): ids for request, (_, ids, *_) in zip(asked(), alone, strict=True)}

    def propose(ids: Sequence[int], most: int) -> Iterable[int]:
        """What follows, every fifth wrong."""
        prompt, answer = next(
            item
            for item in known.items()
            if tuple(ids[: len(item[0])]) == item[0]
            and list(ids[len(item[0]) :]) == item[1][: len(ids) - len(item[0])]
        )
        done = len(ids) - len(prompt)
        right = enumerate(answer[done : done + most], done)
        return [5 if at % 5 == 4 else token for at, token in right]

    engine = Engine(executor, text=Numbers)
    requests = [replace(one, proposer=propose) for one in asked()]
    assert [told(one) for one in [Generation(engine, one) for one in requests]] == alone
    counts = engine.stats().counts
    assert counts.guessed_tokens > counts.accepted_tokens > 50
    engine.close()
