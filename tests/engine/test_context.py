"""What is reused, what is computed, and that it never shows in the logits."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from fake_executor import VOCAB, FakeExecutor, expected

from squall.engine.context import Context
from squall.errors import InvalidRequest

SIZE = 256


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor(SIZE)


@pytest.fixture
def context(executor: FakeExecutor) -> Context:
    return Context(executor, size=SIZE, max_rows=32, max_outputs=8)


def test_random_histories_give_the_logits_of_a_fresh_start(
    context: Context, executor: FakeExecutor, rng: np.random.Generator
) -> None:
    ids = [5]
    for _ in range(400):
        match rng.integers(5):
            case 0:
                ids = rng.integers(VOCAB, size=rng.integers(1, 100)).tolist()
            case 1:
                ids = ids[: rng.integers(len(ids) + 1)] + rng.integers(VOCAB, size=3).tolist()
            case 2:
                executor.fail = True
                with pytest.raises(KeyboardInterrupt):
                    context.advance([*ids[:9], 1])
                executor.fail = False
            case 3:
                chunks = context.logit_chunks(ids, chunk=int(rng.integers(1, 33)))
                found = np.concatenate([rows for _, rows in chunks])
                assert np.array_equal(found, [expected(ids[:stop]) for stop in every_stop(ids)])
            case _:
                ids.append(int(rng.integers(VOCAB)))
        ids = ids[: SIZE - 4]
        logits, known = context.advance(ids)
        assert np.array_equal(logits, expected(ids))
        assert known < len(ids)


def every_stop(ids: list[int]) -> range:
    return range(1, len(ids) + 1)


def test_a_follow_up_computes_only_what_is_new(context: Context, executor: FakeExecutor) -> None:
    first = list(range(40))
    context.advance(first)
    executor.rows.clear()
    _, known = context.advance([*first, 1, 2, 3])
    assert (known, executor.rows) == (40, [3])
    _, known = context.advance(first[:20])
    assert known == 19


def test_a_prompt_goes_in_steps_of_max_rows(context: Context, executor: FakeExecutor) -> None:
    context.advance(list(range(70)))
    assert executor.rows == [32, 32, 6]


def test_logits_from_a_start(context: Context) -> None:
    ids = list(range(50))
    chunks = list(context.logit_chunks(ids, chunk=16, start=37))
    assert [first for first, _ in chunks] == [37, 45]
    assert np.array_equal(chunks[-1][1][-1], expected(ids))


def test_threads_take_turns(context: Context) -> None:
    wrong: list[list[int]] = []

    def answer(start: int) -> None:
        ids = [start] * 10
        for token in range(30):
            logits, _ = context.advance(ids)
            if not np.array_equal(logits, expected(ids)):
                wrong.append(list(ids))
            ids.append(token)
        context.release(ids)

    threads = [threading.Thread(target=answer, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_an_abandoned_turn_is_taken_over(context: Context) -> None:
    context.advance([1, 2, 3])
    taken = threading.Thread(target=context.advance, args=([4, 5],))
    taken.start()
    taken.join(10)
    assert not taken.is_alive()


def test_closed(context: Context) -> None:
    context.close()
    with pytest.raises(InvalidRequest, match="closed"):
        context.advance([1])
