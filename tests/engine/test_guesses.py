"""Guesses and constraints: guesses change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from engine_requests import (
    GREEDY,
    Follows,
    Numbers,
    alone,
    any_request,
    idle,
    other_parity,
    request,
    settle,
    told,
)
from fake_executor import VOCAB, FakeExecutor, Silent, expected
from invariants import check_scheduler

from squall.engine import reply
from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.request import Piece, Request, Scoring
from squall.engine.sampling import Breakers, Dry, Sampling
from squall.errors import SamplingFailed


class Foresight:
    """Guesses what is known to come; each guess is wrong with a chance of one in `wrong`."""

    def __init__(self, prompt: Sequence[int], answer: Sequence[int], wrong: int = 4) -> None:
        self._all = [*prompt, *answer]
        self._chance = np.random.default_rng(len(self._all))
        self._wrong = wrong

    def __call__(self, ids: Sequence[int], most: int) -> list[int]:
        assert list(ids) == self._all[: len(ids)]
        right = self._all[len(ids) : len(ids) + most]
        return [(i + (self._chance.integers(self._wrong) == 0)) % VOCAB for i in right]


def guessing(wanted: Request, answer: Sequence[int], **options: Any) -> Request:
    """The same request with a proposer that is partly wrong."""
    given = {name: getattr(wanted, name) for name in Request.__dataclass_fields__}
    return Request(**given | {"proposer": Foresight(wanted.ids, answer), **options})


@pytest.mark.parametrize("blocks", [14, 64])
@pytest.mark.parametrize("chunk", [1, 7, 32])
@pytest.mark.parametrize("options", [{}, {"prefix_cache_n": 0}, {"no_kv_cache": True}])
def test_guesses_that_are_partly_wrong_change_nothing(
    rng: np.random.Generator, blocks: int, chunk: int, options: dict[str, Any]
) -> None:
    """Ids, text, log-probabilities and ends; batched, chunked, preempted, after prefix hits."""
    stems = rng.integers(VOCAB, size=(3, 30)).tolist()
    # Those that begin grow beyond 14 blocks together.
    wanted = [request([i, 7], max_tokens=25, ignore_eos=True) for i in range(6)]
    wanted += [any_request(rng, stems) for _ in range(20 if "no_kv_cache" in options else 35)]
    ends = frozenset({5, 6})
    plain = Engine(FakeExecutor(), EngineConfig(max_seqs=1), text=Numbers, stop_ids=ends)
    right = [told(Generation(plain, one)) for one in wanted]
    plain.close()
    config = EngineConfig(max_seqs=6, prompt_batchsize=chunk, **options)
    executor = FakeExecutor(blocks=blocks, context=56, max_outputs=24)
    engine = Engine(executor, config, text=Numbers, stop_ids=ends)
    every = [guessing(one, found[1]) for one, found in zip(wanted, right, strict=True)]
    try:
        for _ in ("cold", "warm"):
            executor.hold()  # until all are there
            generations = [Generation(engine, one) for one in every]
            executor.let()
            assert [told(generation) for generation in generations] == right
        settle(engine)
        assert idle(engine)
        stats = engine.stats()
        counts = stats.counts
        usages = [generation.usage for generation in generations]
        # One row of prompts a step lets few run at a time.
        assert (stats.preemptions > 0) == (blocks == 14) or (chunk, blocks) == (1, 14)
        assert (counts.cached_tokens > 0) == (not options)
        if "no_kv_cache" in options:
            assert counts.guessed_tokens == 0
        else:
            assert counts.guessed_tokens > counts.accepted_tokens > 100
            assert sum(usage.accepted_tokens for usage in usages) > 50
        assert counts.answer_tokens == 2 * sum(len(found[1]) for found in right) + 1
    finally:
        engine.close()


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor(max_outputs=32)


@pytest.fixture
def engine(executor: FakeExecutor) -> Iterator[Engine]:
    engine = Engine(executor, EngineConfig(max_seqs=4), text=Numbers)
    yield engine
    executor.let()
    engine.close()


def test_right_guesses_save_steps(engine: Engine, executor: FakeExecutor) -> None:
    answer = alone(request([1, 2], max_tokens=40))
    wanted = request([1, 2], max_tokens=40, proposer=lambda ids, _: answer[len(ids) - 2 :][:7])
    generation = Generation(engine, wanted)
    generation.read()
    assert generation.ids == answer
    assert executor.rows == [[2], [8], [8], [8], [8], [7]]
    assert generation.usage.guessed_tokens == generation.usage.accepted_tokens == 34


def test_guesses_never_go_beyond_the_answer(engine: Engine) -> None:
    """No row lies outside the context, and none is computed for nothing."""
    asked: list[int] = []

    def propose(_: Sequence[int], most: int) -> Iterator[int]:
        asked.append(most)
        return count(0)  # without end

    for size, max_tokens in [(250, None), (10, 6), (10, 2), (10, 1)]:
        wanted = request([2] * size, max_tokens=max_tokens, proposer=propose)
        generation = Generation(engine, wanted)
        generation.read()
        room = max_tokens or 6
        assert generation.ids == alone(request([2] * size, max_tokens=room))
        assert all(1 <= most <= room - 2 for most in asked)
        assert (asked != []) == (room > 2)
        asked.clear()


def test_a_prompt_may_end_in_cached_guesses(engine: Engine) -> None:
    """What was right is in the prefix cache, and what was wrong is not."""
    answer = alone(request([9] * 5, max_tokens=40))
    first = Generation(engine, guessing(request([9] * 5, max_tokens=40), answer))
    first.read()
    assert 0 < first.usage.accepted_tokens < first.usage.guessed_tokens
    check_scheduler(engine._scheduler)
    again = request([9] * 5 + answer + [1])
    second = Generation(engine, again)
    second.read()
    assert second.usage.cached_tokens == 44
    assert second.ids == alone(again)


def test_guesses_share_the_rows_of_a_step(executor: FakeExecutor) -> None:
    """Who has no guesses leaves its share to others."""
    executor.max_outputs = 12
    engine = Engine(executor, EngineConfig(max_seqs=4), text=Numbers)
    asked: list[tuple[int, int]] = []

    def propose(ids: Sequence[int], most: int) -> list[int]:
        asked.append((ids[0], most))
        return [7] * (most - 1)

    executor.hold()
    wanted = [request([i], max_tokens=30, proposer=propose) for i in (1, 2)] + [request([3])]
    generations = [Generation(engine, one) for one in wanted]
    executor.let()
    for generation, one in zip(generations, wanted, strict=True):
        generation.read()
        assert generation.ids == alone(one)
    # The first begins alone.
    assert asked[asked.index((1, 4)) + 1] == (2, 6)
    engine.close()


def test_scoring_and_guesses(engine: Engine) -> None:
    ids, found = list(range(50)), []

    def take(first: int, rows: np.ndarray) -> None:
        assert first == len(found)
        found.extend(rows)

    answer = alone(request(ids))
    generation = Generation(engine, guessing(request(ids, scoring=Scoring(take)), answer))
    generation.read()
    assert generation.ids == answer
    assert np.array_equal(found, [expected(ids[: i + 1]) for i in range(50)])


@pytest.mark.parametrize(
    ("proposer", "error"),
    [
        (lambda *_: 1 / 0, ZeroDivisionError),
        (lambda *_: [0.5], TypeError),
        (lambda *_: "ab", TypeError),
        (lambda *_: None, TypeError),
        (lambda *_: [2**40], OverflowError),
    ],
)
def test_a_bad_proposer_ends_its_own_request(
    engine: Engine, proposer: Any, error: type[Exception]
) -> None:
    wanted = request([1], max_tokens=60)
    stays = Generation(engine, wanted)
    with pytest.raises(error):
        Generation(engine, request([2], proposer=proposer)).read()
    stays.read()
    assert stays.ids == alone(wanted)
    settle(engine)
    assert idle(engine)


def test_ids_that_the_model_does_not_have_are_not_guesses(engine: Engine) -> None:
    for guesses in ([VOCAB], [-1], [VOCAB - 1, VOCAB, 0]):
        generation = Generation(engine, request([2], proposer=lambda *_, g=guesses: g))
        generation.read()
        assert generation.ids == alone(request([2]))


# ---- constraints ----


def test_a_constraint_prepares_while_the_executor_runs(
    engine: Engine, executor: FakeExecutor
) -> None:
    asked: list[list[int]] = []
    threads, prepared = set(), threading.Event()

    def even(ids: Sequence[int]) -> range:
        asked.append(list(ids))
        threads.add(threading.current_thread().name)
        prepared.set()
        return range(0, VOCAB, 2)

    executor.hold()
    wanted = request([4] * 40, max_tokens=3, constraint=lambda: Follows(even))
    generation = Generation(engine, wanted)
    executor.wait()
    assert not prepared.wait(0.05)  # the prompt is not complete in this step
    executor.let(1)
    executor.wait()
    assert prepared.wait(10)
    executor.let()
    generation.read()
    assert all(token % 2 for token in generation.ids)
    assert asked == [generation.ids[:i] for i in range(3)]
    assert "squall-engine" not in threads


def test_a_constraint_is_asked_about_each_guess(engine: Engine) -> None:
    asked: list[list[int]] = []

    def uneven(ids: Sequence[int]) -> range:
        asked.append(list(ids))
        return range(1, VOCAB, 2)

    plain = Generation(engine, request([3], max_tokens=6, constraint=lambda: Follows(uneven)))
    plain.read()
    asked.clear()
    known, first, second = plain.ids[:3]
    guesses = {2: [first, second, 1, 8]}  # an odd one must not come
    wanted = request(
        [3],
        max_tokens=6,
        constraint=lambda: Follows(uneven),
        proposer=lambda ids, _: guesses.get(len(ids), []),
    )
    generation = Generation(engine, wanted)
    generation.read()
    assert generation.ids == plain.ids
    assert generation.usage.accepted_tokens == 2
    guessed = [[known, first, second, 1, 8][:i] for i in range(1, 6)]
    assert asked == [[], *guessed, plain.ids[:4], plain.ids[:5]]


@pytest.mark.parametrize(
    "options", [{}, {"ignore_eos": True}, {"sampling": Sampling(min_tokens=9)}]
)
def test_a_matcher_ends_the_answer(engine: Engine, options: dict[str, Any]) -> None:
    """With a token that belongs to it, also before `min_tokens`."""
    path = {0: 7, 1: 9, 2: 5}  # nothing but 5, an end token, may come third

    def others(ids: Sequence[int]) -> set[int]:
        return set(range(VOCAB)) - {path[len(ids)]}

    for end, text, ids in ((9, "7 9 ", [7, 9]), (None, "7 9 ", [7, 9, 5])):
        if end is None and "ignore_eos" in options:
            continue
        wanted = request(
            [2],
            max_tokens=20,
            constraint=lambda end=end: Follows(others, end),
            stop_ids=frozenset({5}),
            **options,
        )
        assert told(Generation(engine, wanted)) == (text, ids, [], "stop")


def test_forced_tokens_take_one_step(engine: Engine) -> None:
    path = [7, 9, 11, 13, 15, 17]

    class Forced(Follows):
        def __init__(self) -> None:
            super().__init__(lambda ids: set(range(VOCAB)) - {*path[len(ids) :][:1]}, path[-1])

        def forced(self, most: int) -> list[int]:
            return path[len(self._ids) :][:most]

    steps = engine.stats().counts.steps
    generation = Generation(engine, request([2], max_tokens=20, constraint=Forced))
    generation.read()
    assert generation.ids == path
    assert generation.usage.accepted_tokens == 6
    assert engine.stats().counts.steps == steps + 1


class BadMatcher(Follows):
    """A matcher that fails in one of its methods."""

    def __init__(self, name: str, result: Any) -> None:
        super().__init__(lambda _: ())

        def fail(*_: Any) -> Any:
            if isinstance(result, Exception):
                raise result
            return result

        setattr(self, name, fail)


@pytest.mark.parametrize("result", [ZeroDivisionError(), 5, ["a"], [np.zeros(2**20, np.uint32)]])
@pytest.mark.parametrize("name", ["allowed", "forced", "accept"])
def test_a_bad_matcher_ends_its_own_request(engine: Engine, name: str, result: Any) -> None:
    if name == "accept" and not isinstance(result, Exception):
        return
    wanted = request([1], max_tokens=60)
    stays = Generation(engine, wanted)
    with pytest.raises((SamplingFailed, ArithmeticError, TypeError, ValueError)):
        Generation(engine, request([2], constraint=lambda: BadMatcher(name, result))).read()
    early = request(
        [2], constraint=lambda: BadMatcher(name, result), sampling=Sampling(min_tokens=5),
        stop_ids=frozenset({5}),
    )  # fmt: skip
    with pytest.raises((SamplingFailed, ArithmeticError, TypeError, ValueError)):
        Generation(engine, early).read()
    none = request([2], constraint=lambda: Follows(lambda _: range(VOCAB)))
    with pytest.raises(SamplingFailed, match="no token"):
        Generation(engine, none).read()
    stays.read()
    assert stays.ids == alone(wanted)
    settle(engine)
    assert idle(engine)


def test_masks_must_be_of_each_guess(engine: Engine) -> None:
    """Otherwise what follows a guess would be free."""

    class Short(Follows):
        def allowed(self, _: Sequence[int]) -> list[np.ndarray]:
            return super().allowed(())

    wanted = request([2], max_tokens=9, constraint=lambda: Short(lambda _: (1,)))
    Generation(engine, wanted).read()
    with pytest.raises(SamplingFailed, match="1 masks for 2 guesses"):
        Generation(engine, replace(wanted, proposer=lambda *_: [3, 4])).read()


def test_slow_masks_end_their_own_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All wait for them. Time that others take, or now and then a slow one, is not held against."""
    monkeypatch.setattr(reply, "OVER_S", 0.05)
    slow = {3: 0.03, 20: 0.03}

    def burn(seconds: float) -> tuple[()]:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return ()

    stays = [
        request([1], max_tokens=60),
        request(
            [2], max_tokens=40, constraint=lambda: Follows(lambda i: burn(slow.get(len(i), 0)))
        ),
        request([3], max_tokens=9, constraint=lambda: Follows(lambda _: time.sleep(0.02) or ())),
    ]
    generations = [Generation(engine, one) for one in stays]

    class Slow(Follows):
        def accept(self, token: int) -> None:
            super().accept(token)
            burn(0.03)

    for matcher in (lambda: Follows(lambda _: burn(0.03)), lambda: Slow(lambda _: ())):
        with pytest.raises(SamplingFailed, match="takes too long"):
            Generation(engine, request([4], max_tokens=60, constraint=matcher)).read()
    for generation, one in zip(generations, stays, strict=True):
        generation.read()
        assert generation.ids == alone(one)


# ---- what goes wrong for one request ----


class Fails(Silent):
    """Text that cannot be made."""

    def __init__(self, wanted: Request) -> None:
        self._part = wanted.stop

    def push(self, _: int) -> str:
        if "push" in self._part:
            raise ZeroDivisionError
        return "x"

    def finish(self) -> str:
        if "finish" in self._part:
            raise ZeroDivisionError
        return ""


@pytest.mark.parametrize("part", ["push", "finish", "breaks", "advance", "nan"])
def test_one_error_ends_one_request(
    part: str, executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told, its blocks are free, and the others do not notice."""
    engine = Engine(executor, EngineConfig(max_seqs=4), text=Fails)
    advance = engine._scheduler.advance

    def broken(chunk: Any) -> bool:
        if "advance" in chunk.of.request.stop:
            raise ZeroDivisionError
        return advance(chunk)

    monkeypatch.setattr(engine._scheduler, "advance", broken)
    executor.nan = 66 if part == "nan" else -1
    texts = [b"a"]  # of one token only
    dry = Dry(2.0, breakers=Breakers(("b",), lambda _: texts.pop()))
    sampling = Sampling(temperature=0, seed=0, dry=dry) if part == "breaks" else GREEDY
    wanted = request([1], max_tokens=60)
    stays = Generation(engine, wanted)
    bad = Generation(engine, request([66], stop=(part,), sampling=sampling))
    errors = {"nan": SamplingFailed, "breaks": IndexError}
    with pytest.raises(errors.get(part, ZeroDivisionError)):
        bad.read()
    stays.read()
    assert stays.ids == alone(wanted)
    settle(engine)
    assert idle(engine)
    assert engine.stats().counts.errors == 1
    engine.close()


def test_a_draw_that_raises_ends_its_own_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from squall.engine import sampling

    sample_rows = sampling.sample_rows

    def broken(logits: Any, rows: Any, **options: Any) -> Any:
        if any(row.top_logprobs == 7 for row in rows):
            raise MemoryError
        return sample_rows(logits, rows, **options)

    monkeypatch.setattr(sampling, "sample_rows", broken)
    wanted = request([1], max_tokens=60)
    stays = Generation(engine, wanted)
    with pytest.raises(MemoryError):
        Generation(engine, request([2], logprobs=7)).read()
    stays.read()
    assert stays.ids == alone(wanted)


def test_a_sink_may_close_the_engine_while_a_step_is_planned(executor: FakeExecutor) -> None:
    """Then the others are cancelled, after the step."""
    died: list[BaseException] = []
    engine = Engine(executor, EngineConfig(max_seqs=4), text=Numbers, on_death=died.append)
    executor.hold()
    stays = Generation(engine, request([1], max_tokens=60, constraint=other_parity))

    def sink(piece: Piece) -> None:
        if piece.error is not None:
            engine.close()

    engine.submit(request([2], max_tokens=60, proposer=lambda *_: 1 / 0), sink)
    executor.let()
    stays.read()
    assert stays.finish_reason == "cancelled"
    assert not died
    engine.close()


def test_an_end_is_told_once(engine: Engine) -> None:
    pieces: list[Piece] = []

    def sink(piece: Piece) -> None:
        pieces.append(piece)
        raise ValueError

    engine.submit(request([1]), sink)
    settle(engine)
    assert [piece.finish_reason for piece in pieces] == [None, "error"]
