"""Limits hold in every step, everything ends, and neither prompts nor answers starve."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from invariants import check_scheduler

from squall.engine.prefix_cache import PrefixCache
from squall.engine.request import Request, Scoring
from squall.engine.sampling import Sampling
from squall.engine.scheduler import Guess, Limits, Pace, Scheduler
from squall.engine.sequence import Chunk, Sequence

SIZE = 4
GREEDY = Sampling(temperature=0, seed=0)
# (sequence, most) -> at most so many guesses
OneGuess = Callable[[Sequence, int], list[int]]


def ignore(first: int, rows: object) -> None:
    """Logits that nobody reads."""


def sequence(
    number: int, tokens: list[int], *, scored: int | None = None, chunk: int | None = None
) -> Sequence:
    scoring = None if scored is None else Scoring(ignore, scored)
    request = Request(ids=tokens, sampling=GREEDY, scoring=scoring, chunk=chunk)
    return Sequence(request, number, list(tokens), len(tokens) - 1 if scored is None else scored)


def scheduler(*, blocks: int = 64, requests: int = 4, rows: int = 32, **limits: int) -> Scheduler:
    cache = PrefixCache(blocks, SIZE, limit=blocks)
    return Scheduler(cache, Limits(requests, rows, limits.get("outputs", requests)))


def no_guess(_: Sequence, most: int) -> list[int]:
    assert most > 0
    return []


def each(scheduler: Scheduler, guess: OneGuess) -> Guess:
    """Sets what `guess` says for each sequence; they share the room."""

    def guess_all(answers: list[Sequence], spare: int) -> None:
        for left, one in zip(range(len(answers), 0, -1), answers, strict=True):
            assert not one.guesses
            if most := scheduler.reserve(one, spare // left):
                one.guesses = guess(one, most)
                spare -= len(one.guesses)

    return guess_all


def step(
    scheduler: Scheduler, seconds: float = 0.01, guess: OneGuess = no_guess
) -> tuple[list[Chunk], list[Sequence]]:
    """A step and who is due a token."""
    chunks = scheduler.plan(each(scheduler, guess))
    rows = sum(chunk.stop - chunk.start for chunk in chunks)
    assert rows <= scheduler.limits.rows
    assert sum(len(chunk.outputs) for chunk in chunks) <= scheduler.limits.outputs
    check_scheduler(scheduler)
    scheduler.pace.observe(rows, seconds)
    due = [chunk.of for chunk in chunks if chunk.due]
    assert due == [chunk.of for chunk in chunks if scheduler.advance(chunk)]
    check_scheduler(scheduler)
    return chunks, due


class Load:
    """Requests that come, grow, leave early or end, by chance."""

    def __init__(self, tested: Scheduler, rng: np.random.Generator) -> None:
        self.tested = tested
        self.rng = rng
        self.lengths: list[int] = []
        self.gone: set[int] = set()

    def arrive(self) -> None:
        rng = self.rng
        size = int(rng.integers(1, 38))
        scored = int(rng.integers(size)) if rng.integers(4) == 0 else None
        chunk = int(rng.integers(1, 20)) if rng.integers(4) == 0 else None
        tokens = rng.integers(2, size=size).tolist()
        self.tested.add(sequence(len(self.lengths), tokens, scored=scored, chunk=chunk))
        self.lengths.append(int(rng.integers(size, 40)))

    def leave(self) -> None:
        everyone = self.tested.waiting + self.tested.running
        if everyone:
            self.end(everyone[self.rng.integers(len(everyone))])

    def end(self, request: Sequence) -> None:
        self.tested.remove(request)
        self.gone.add(request.number)
        check_scheduler(self.tested)

    def step(self) -> None:
        for request in step(self.tested, float(self.rng.random()), self.guess)[1]:
            while True:
                assert request.scored == request.computed + self.recomputed(request)
                assert request.scored == len(request.tokens)
                if len(request.tokens) >= self.lengths[request.number]:
                    self.end(request)
                    break
                guesses = list(request.guesses)
                right = self.tested.append(request, int(self.rng.integers(2)))
                assert right == (guesses[:1] == request.tokens[-1:])
                assert request.guesses == guesses[1:] * right
                check_scheduler(self.tested)
                if not right:
                    break

    def recomputed(self, request: Sequence) -> int:
        """Tokens that are known and forgotten again."""
        return len(request.tokens) if self.tested.limits.recompute else 0

    def guess(self, request: Sequence, most: int) -> list[int]:
        """Some, now and then; as what is drawn, they are 0 or 1."""
        assert request.pending == 1
        assert most > 0
        room = min(most, self.lengths[request.number] - len(request.tokens))
        return self.rng.integers(2, size=self.rng.integers(room + 1)).tolist()


@pytest.mark.parametrize("recompute", [False, True])
def test_random_load(rng: np.random.Generator, *, recompute: bool) -> None:
    blocks = int(rng.integers(10, 40))
    cache = PrefixCache(blocks, SIZE, limit=0 if recompute else int(rng.integers(blocks)))
    limits = Limits(int(rng.integers(1, 8)), 32, int(rng.integers(8, 12)), recompute=recompute)
    load = Load(Scheduler(cache, limits), rng)
    for _ in range(1000):
        if rng.integers(3) == 0:
            load.arrive()
        if rng.integers(20) == 0:
            load.leave()
        load.step()
    for _ in range(50_000):
        load.step()
        if len(load.gone) == len(load.lengths):
            break
    assert len(load.gone) == len(load.lengths)
    assert cache.pool.available == blocks


def test_row_33_a_long_prompt_and_running_answers_both_go_on() -> None:
    tested = scheduler(blocks=4000, requests=16, rows=512)
    answers = [sequence(i, [i]) for i in range(8)]
    for answer in answers:
        tested.add(answer)
    row_s = 1 / 800
    for _ in range(5):
        for request in step(tested, 9 * row_s)[1]:
            tested.append(request, 0)
    long = sequence(99, list(range(6000)))
    tested.add(long)
    steps, due = 0, list[Sequence]()
    while long not in due:
        before = long.computed
        chunks = tested.plan()
        rows = sum(chunk.stop - chunk.start for chunk in chunks)
        tested.pace.observe(rows, rows * row_s)
        due = [chunk.of for chunk in chunks if tested.advance(chunk)]
        assert long.computed > before
        assert set(due) >= set(answers)
        assert rows * row_s <= 0.25
        for request in due:
            tested.append(request, 0)
        steps += 1
    assert steps < 200


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    tested = scheduler(blocks=400, rows=64)
    tested.add(sequence(0, [0] * 1000))
    tested.add(sequence(1, [1] * 20))
    due = [request.number for _ in range(3) for request in step(tested)[1]]
    assert due == [1]


def test_what_one_computes_others_wait_for_and_share() -> None:
    """Several answers to one prompt compute it once."""
    tested = scheduler(blocks=100, rows=32)
    for number in range(4):
        tested.add(sequence(number, [7] * 41))
    computed = sum(chunk.stop - chunk.start for _ in range(8) for chunk in step(tested)[0])
    assert computed <= 41 + 3 + 4 * 8
    blocks = [request.blocks[:10].tolist() for request in tested.running]
    assert blocks == [blocks[0]] * 4


def test_the_youngest_is_preempted_and_comes_back() -> None:
    tested = scheduler(blocks=5, requests=3)
    old, young = sequence(0, [0] * 6), sequence(1, [1] * 3)
    tested.add(old)
    tested.add(young)
    for _ in range(60):
        for request in step(tested)[1]:
            tested.append(request, 0)
        if tested.preemptions:
            break
    assert tested.running == [old]
    assert tested.waiting == [young]
    tested.remove(old)
    step(tested)
    assert tested.running == [young]


def test_nothing_overtakes_who_waits_for_blocks() -> None:
    tested = scheduler(blocks=8)
    tested.add(sequence(0, [0] * 20))
    step(tested)
    tested.add(sequence(1, [1] * 30))
    tested.add(sequence(2, [2]))
    step(tested)
    assert [request.number for request in tested.running] == [0]


def test_pace_follows_the_machine() -> None:
    pace = Pace()
    assert (pace.rows(512, alone=True), pace.rows(512, alone=False)) == (512, 64)
    for seconds in [1.0] * 20:
        pace.observe(100, seconds)
    assert pace.rows(512, alone=False) == 16
    assert 40 <= pace.rows(512, alone=True) <= 60
    for seconds in [0.01] * 20:
        pace.observe(100, seconds)
    assert pace.rows(512, alone=False) == 512


def test_wrong_guesses_delay_and_preempt_nobody() -> None:
    """Who computes what in which step is as without them."""

    def play(guess: OneGuess) -> tuple[list[list[tuple[int, int, int]]], int]:
        rng = np.random.default_rng(3)
        # No prefix is kept, as guesses may take the place of some.
        tested = Scheduler(PrefixCache(24, SIZE, limit=0), Limits(6, 32, 10))
        played = []
        for number in range(120):
            if number % 3 == 0:
                tested.add(sequence(number, rng.integers(9, size=rng.integers(1, 30)).tolist()))
            chunks, due = step(tested, 1e-6, guess)
            played.append([(c.of.number, c.start, min(c.stop, len(c.of.tokens))) for c in chunks])
            for one in due:
                assert not tested.append(one, 0)
                if len(one.tokens) % 20 == 0:
                    tested.remove(one)
        return played, tested.preemptions

    asked: list[int] = []

    def wrong(_: Sequence, most: int) -> list[int]:
        asked.append(most)
        return [1] * most

    without = play(no_guess)
    assert without[1] > 0
    assert play(wrong) == without
    assert len(asked) > 50


def test_guesses_share_what_is_left() -> None:
    """Rows, outputs and blocks that prompts and other answers do not need in this step."""
    tested = scheduler(blocks=100, rows=32, outputs=12)
    for number in range(3):
        tested.add(sequence(number, [number]))
    asked: list[int] = []

    def guess(one: Sequence, most: int) -> list[int]:
        asked.append(most)
        return [7] * (most - 1 if one.number == 0 else most)

    chunks, due = step(tested, guess=guess)
    assert asked == [3, 3, 4]
    assert [len(chunk.outputs) for chunk in chunks] == [3, 4, 5]
    assert [len(one.blocks) for one in due] == [1, 1, 2]
    for one in due:
        assert tested.append(one, 7)
        assert not tested.append(one, 0)
    assert [len(one.blocks) for one in due] == [1, 1, 1]
    tested.add(sequence(3, [3] * 40))
    asked.clear()
    chunks, _ = step(tested, guess=guess)
    assert [(chunk.of.number, len(chunk.outputs)) for chunk in chunks[3:]] == [(3, 0)]
    assert chunks[3].stop == 29  # as much as there is for it without guesses
    assert asked == []


def test_no_blocks_no_guesses() -> None:
    tested = scheduler(blocks=3, requests=2, outputs=20)
    tested.add(sequence(0, [0] * 3))
    tested.add(sequence(1, [1] * 3))
    for one in step(tested)[1]:
        tested.append(one, 0)
    asked: list[int] = []

    def guess(_: Sequence, most: int) -> list[int]:
        asked.append(most)
        return [1] * most

    _, due = step(tested, guess=guess)
    # Both have their block full; the older takes the one that is left.
    assert asked == [4]
    assert [len(one.blocks) for one in due] == [2, 1]
    assert not any(tested.append(one, 0) for one in due)
    assert [len(one.blocks) for one in due] == [2, 1]  # its known token has it now
