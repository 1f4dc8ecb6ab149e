"""Jobs and the queue: all answers of a job get in, or none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_executor import FakeExecutor, Silent
from helpers import wait_for

from squall import CompletionRequest, EngineConfig, EngineStopped, InvalidRequest, Model, QueueFull
from squall.api.jobs import CompletionJob, start_completion
from squall.assembly import Assembly
from squall.engine.engine import Engine
from squall.recipes import load

PROMPT = [7, 8, 9]


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
def small(model: Model, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """Two answers run, three wait, on an executor that waits when it is told to."""
    engine = Engine(executor, EngineConfig(max_seqs=2, max_queue=3), text=Silent)
    recipe = load(model.checkpoint)
    monkeypatch.setattr(executor, "program", model.program, raising=False)
    parts = model.checkpoint, recipe, model.tokenizer, None, engine, model.adapters
    with Model(Assembly(*parts)) as opened:
        yield opened
        executor.let()


def start(model: Model, n: int, prompt: list[int] = PROMPT) -> CompletionJob:
    return start_completion(model, CompletionRequest(prompt=prompt, max_tokens=5, n=n, seed=1))


def test_all_or_none(small: Model, executor: FakeExecutor) -> None:
    executor.hold()
    first = start(small, 3)
    executor.wait()
    with pytest.raises(QueueFull) as refused:
        start(small, 3)
    assert refused.value.retry_after_s >= 1
    executor.let()
    assert [choice.finish_reason for choice in first.response().choices] == ["length"] * 3
    wait_for(lambda: small.engine.stats().blocks_used == 0)
    counts = small.engine.stats().counts
    assert (counts.finished, counts.cancelled) == (3, 2)
    assert len(start(small, 5).response().choices) == 5


def test_what_can_never_be_queued_is_refused_for_good(small: Model) -> None:
    with pytest.raises(InvalidRequest, match="6 answers at a time; at most 5"):
        start(small, 6)


def test_answers_share_their_prompt(small: Model) -> None:
    prompt = list(range(40))
    usage = start(small, 3, prompt).response().usage
    assert usage.prompt_tokens == 40
    assert small.engine.stats().counts.prompt_tokens < 60


def test_an_engine_that_died(small: Model, executor: FakeExecutor) -> None:
    executor.fail = MemoryError("no room")
    executor.hold()  # until both answers are in
    job = start(small, 2)
    executor.let()
    with pytest.raises(EngineStopped, match="no room"):
        job.response()
    with pytest.raises(EngineStopped, match="no room"):
        start(small, 1)
