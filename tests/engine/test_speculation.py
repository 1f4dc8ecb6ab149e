"""Looked up and drafted guesses: they change how long an answer takes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from engine_requests import (
    Numbers,
    alone,
    any_request,
    idle,
    odd,
    other_parity,
    request,
    settle,
    told,
)
from fake_executor import VOCAB, FakeExecutor, expected
from numpy.typing import NDArray

from squall.engine.draft import Draft
from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import Breakers, Dry, Sampling
from squall.engine.speculation import Cost, Lookup, Speculation, share_out


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


def engine_of(executor: FakeExecutor, kind: str, **options: Any) -> Engine:
    return Engine(
        executor, EngineConfig(**options), text=Numbers, speculation=speculation(executor, kind)
    )


def drafter(engine: Engine) -> FakeExecutor:
    """What the draft runs on."""
    draft = engine._stepper._speculation.draft
    assert draft is not None
    assert isinstance(draft.executor, FakeExecutor)
    return draft.executor


@pytest.mark.parametrize("temperature", [0.0, 30.0])
@pytest.mark.parametrize("blocks", [20, 200])
def test_a_draft_that_is_the_model_is_always_right(blocks: int, temperature: float) -> None:
    """So its cache is: chunked, preempted, after prefix hits, behind grammars and penalties."""
    engine = engine_of(FakeExecutor(blocks=blocks, max_outputs=48), "perfect", max_seqs=6)
    sampling = Sampling(temperature=temperature, seed=3, repetition_penalty=1.3, min_tokens=5)
    wanted = [
        request(
            [i % 3] * (10 + 5 * i), max_tokens=30, sampling=replace(sampling, seed=i),
            constraint=(None, odd, other_parity)[i % 3],
        )
        for i in range(12)
    ]  # fmt: skip
    for _ in ("cold", "warm"):
        generations = [Generation(engine, one) for one in wanted]
        for generation in generations:
            generation.read()
            assert 0 < generation.usage.accepted_tokens == generation.usage.guessed_tokens
    settle(engine)
    assert idle(engine)
    assert (engine.stats().preemptions > 0) == (blocks == 20)
    engine.close()


def test_a_draft_finds_prefixes_again() -> None:
    """What one answer had it compute the next one does not; a block that was taken is not known."""
    engine = engine_of(FakeExecutor(blocks=32), "perfect", max_seqs=1)
    prompt = list(range(40))
    rows = drafter(engine).rows

    def computed() -> int:
        rows.clear()
        generation = Generation(engine, request(prompt, max_tokens=12))
        generation.read()
        assert generation.usage.accepted_tokens == generation.usage.guessed_tokens
        return sum(map(sum, rows))

    first = computed()
    assert first > 40
    assert computed() <= first - 30
    Generation(engine, request([7] * 90, max_tokens=30)).read()
    assert computed() > first - 15
    engine.close()


def test_several_begin_alike() -> None:
    """Prefixes that are shared are computed by one of those that run."""
    engine = engine_of(FakeExecutor(max_outputs=48), "perfect", max_seqs=4)
    prompt = list(range(40))
    Generation(engine, request(prompt, max_tokens=1)).read()
    generations = [Generation(engine, request([*prompt, i], max_tokens=30)) for i in range(4)]
    for generation in generations:
        generation.read()
        assert generation.usage.accepted_tokens == generation.usage.guessed_tokens > 0
    assert sum(map(sum, drafter(engine).rows)) < 40 + 4 * 50
    engine.close()


def test_a_draft_with_a_smaller_context_or_vocabulary() -> None:
    """It has nothing to say of what it does not know, and nobody notices."""
    small = FakeExecutor(context=40, logits=lambda ids: expected(ids)[: VOCAB - 40])
    small.vocab = small.ids = VOCAB - 40
    guesses = Speculation(7, Draft(small, VOCAB))
    guesses.cost = Steady(1.0, 1e-3)
    engine = Engine(FakeExecutor(), text=Numbers, speculation=guesses)
    wanted = [request([VOCAB - 1] * 20, max_tokens=40, constraint=c) for c in (None, odd)]
    for one, generation in [(one, Generation(engine, one)) for one in wanted]:
        generation.read()
        plain = Engine(FakeExecutor(), text=Numbers)
        right = Generation(plain, one)
        right.read()
        assert generation.ids == right.ids
        plain.close()
    assert engine.stats().counts.guessed_tokens > 0
    engine.close()


def test_the_model_changes_under_a_draft() -> None:
    """Answers go on as the new model says."""
    executor = FakeExecutor(max_outputs=24)
    engine = engine_of(executor, "perfect", max_seqs=4)
    generation = Generation(engine, request([1, 2, 3], max_tokens=100))
    begun = [next(generation) for _ in range(3)]
    engine.change_model(lambda: setattr(executor, "logits", other))
    generation.read()
    assert begun
    ids = [1, 2, 3, *generation.ids]
    # From some place on, all are the new model's.
    found = [int(other(ids[:i]).argmax()) == ids[i] for i in range(3, len(ids))]
    assert all(found[-20:])
    assert idle(engine)
    engine.close()


def test_a_bad_breaker_ends_its_own_request() -> None:
    """A draft asks a request's own functions too."""
    texts = [b"a"] * 9  # of so many tokens only
    dry = Dry(2.0, breakers=Breakers(("b",), lambda _: texts.pop()))
    engine = engine_of(FakeExecutor(), "perfect", max_seqs=2)
    stays = Generation(engine, request([1], max_tokens=60))
    bad = request([66], max_tokens=60, sampling=Sampling(temperature=0, seed=0, dry=dry))
    with pytest.raises(IndexError):
        Generation(engine, bad).read()
    stays.read()
    assert len(stays.ids) == 60
    engine.close()


@pytest.mark.parametrize("steps", [0, 3])
def test_a_draft_that_fails_is_left(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """Answers go on without it, and the log says why."""
    engine = engine_of(FakeExecutor(), "perfect", max_seqs=2)
    step, left = drafter(engine).step, iter(range(steps))

    def fails(batch: Any) -> Any:
        if next(left, None) is None:
            raise MemoryError("no more")
        return step(batch)

    drafter(engine).step = fails  # type: ignore[method-assign]
    wanted = [request([i], max_tokens=60) for i in range(4)]
    generations = [Generation(engine, one) for one in wanted]
    for generation, one in zip(generations, wanted, strict=True):
        generation.read()
        assert generation.ids == alone(one)
    assert [record.message for record in caplog.records] == [
        "the draft model failed; answers go on without it"
    ]
    settle(engine)
    assert idle(engine)
    engine.close()


def test_masks_that_are_none_do_not_end_a_draft() -> None:
    class Bad:
        finished = False

        def allowed(self, guesses: Sequence[int]) -> list[Any]:
            return [np.zeros(1, np.uint32)] * (1 + len(guesses))

        def forced(self, most: int) -> list[int]:  # noqa: ARG002
            return []

        def accept(self, _: int) -> None: ...

    engine = engine_of(FakeExecutor(), "perfect", max_seqs=2)
    stays = Generation(engine, request([1], max_tokens=60))
    with pytest.raises(ValueError, match="mask"):
        Generation(engine, request([2], max_tokens=60, constraint=Bad)).read()
    stays.read()
    assert stays.ids == alone(request([1], max_tokens=60))
    assert stays.usage.accepted_tokens > 30
    engine.close()


# ---- what is looked up ----


def test_the_longest_match_counts_and_the_latest_of_them() -> None:
    lookup = Lookup()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 7, 8, 1, 6, 7, 8]
    assert lookup.find(text[:10], 4) == ([], 0)
    assert lookup.find([*text[:10], 7, 8], 4) == ([9, 0, 7, 8], 2)
    assert lookup.find(text, 3) == ([1, 6, 7], 2)  # the latest
    lookup = Lookup()
    assert lookup.find([*text[:13], 5, 6, 7, 8], 4) == ([9, 0, 7, 8], 4)  # the longest


def test_a_text_that_goes_round() -> None:
    assert Lookup().find([1, 2, 3] * 4, 7) == ([1, 2, 3, 1, 2, 3, 1], 9)
    assert Lookup().find([5] * 30, 3) == ([5, 5, 5], 29)
    assert Lookup().find([], 3) == Lookup().find([1], 3) == ([], 0)


@hypothesis.given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_what_is_looked_up_did_follow(tokens: list[int], most: int) -> None:
    """Grown token by token or all at once, it is the same, and it stands in the text."""
    lookup = Lookup()
    for end in range(len(tokens)):
        lookup.find(tokens[:end], 1)
    found, matched = lookup.find(tokens, most)
    assert (found, matched) == Lookup().find(tokens, most)
    assert (len(found) == most) == (matched > 0)
    places = [
        i for i in range(matched, len(tokens))
        if tokens[i - matched : i] == tokens[len(tokens) - matched :]
    ]  # fmt: skip
    assert not matched or any(tokens[i] == found[0] for i in places)
    # Every repeat of two tokens is a match.
    pairs = [tuple(tokens[i - 2 : i]) for i in range(2, len(tokens) + 1)]
    assert (matched > 0) == (bool(pairs) and pairs[-1] in pairs[:-1])


def test_a_long_prompt_is_learned_in_parts() -> None:
    """So that no step waits for long."""
    text, lookup, parts = list(range(5000)), Lookup(), 0
    while lookup.find([*text, 4900, 4901], 2) != ([4902, 4903], 2):
        parts += 1
    assert parts == 4


# ---- how many ----


def test_guesses_are_made_as_long_as_they_pay() -> None:
    """With one row of 1 s and 0.1 s for each more, a guess is worth it from some chance on."""
    step = Steady(1.0, 0.1)
    nine = [0.9**i for i in range(1, 30)]

    def shared(odds: Sequence[Sequence[float]], **options: Any) -> list[int]:
        given = {"answers": len(odds), "spare": 60, "step": step} | options
        return share_out(odds, **given)

    def rate(odds: Sequence[float], count: int) -> float:
        return (1 + sum(odds[:count])) / step.of(1 + count)

    (count,) = shared([nine])
    assert count == max(range(29), key=lambda count: rate(nine, count))
    assert shared([[0.05]]) == [0]
    assert shared([nine], spare=3) == [3]
    assert shared([nine, [0.05], []], spare=2) == [2, 0, 0]
    assert shared([]) == []
    # Where rows cost as much as steps nothing pays, and where they cost nothing all does.
    assert shared([nine], step=Steady(0.0, 1.0)) == [0]
    assert shared([nine], step=Steady(1.0, 0.0)) == [29]
    # Many answers share a step, so that a guess saves less.
    assert max(shared([nine] * 16, spare=1000)) < count


def test_a_draft_costs_time_too() -> None:
    step, nine = Steady(1.0, 0.1), [0.9**i for i in range(1, 30)]

    def shared(odds: Sequence[Sequence[float]], draft: Cost) -> list[int]:
        return share_out(odds, answers=len(odds), spare=60, step=step, draft=draft)

    (cheap,), (dear,) = shared([nine], Steady(0.05, 0.01)), shared([nine], Steady(0.3, 0.01))
    assert 0 < dear < cheap
    assert shared([nine], Steady(1.0, 0.1)) == [0]


def test_costs_are_a_line_through_what_was_measured(rng: np.random.Generator) -> None:
    cost = Cost()
    assert not cost
    cost.observe(1, 1.0)
    assert cost.of(1) == pytest.approx(1.0)
    assert cost.row == pytest.approx(0.1)  # until there is more to see
    for _ in range(200):
        rows = int(rng.integers(1, 10))
        cost.observe(rows, 2.0 + 0.25 * rows + float(rng.normal(0, 0.01)))
    assert cost.fixed == pytest.approx(2.0, rel=0.1)
    assert cost.row == pytest.approx(0.25, rel=0.1)
    cost.observe(5, 1000.0)  # the machine was busy with something else
    assert cost.of(5) < 5
    for _ in range(300):  # and it follows
        cost.observe(rows := int(rng.integers(1, 10)), 1.0 + 0.5 * rows)
    assert cost.of(4) == pytest.approx(3.0, rel=0.1)


def guesses_of(kind: str, fixed: float, row: float, wanted: Request) -> tuple[int, int, int]:
    """Guesses, right ones and steps of an answer where steps cost so much."""
    logits = looping if kind == "lookup" else expected
    executor = FakeExecutor(max_outputs=48, logits=logits)
    engine = engine_of(executor, kind)
    engine._stepper._speculation.cost = Steady(fixed, row)
    generation = Generation(engine, wanted)
    generation.read()
    engine.close()
    usage = generation.usage
    return usage.guessed_tokens, usage.accepted_tokens, len(executor.rows)


def test_row_24_how_many_follows_what_is_accepted() -> None:
    long = request([1, 2], max_tokens=200)
    guessed, accepted, steps = guesses_of("lookup", 1.0, 0.01, long)
    assert accepted > 100
    assert steps < 100
    guessed, accepted, steps = guesses_of("bad", 1.0, 0.1, long)
    assert 0 < guessed < 30  # it learns, and hardly tries again
    assert steps > 150
    assert guesses_of("bad", 0.0, 1.0, long)[0] == 0  # a row costs as much as a step
    assert guesses_of("perfect", 0.0, 1.0, long)[0] == 0


def test_new_requests_begin_with_what_others_learned() -> None:
    engine = engine_of(FakeExecutor(max_outputs=48), "bad")
    engine._stepper._speculation.cost = Steady(1.0, 0.1)
    guessed = []
    for i in range(12):
        generation = Generation(engine, request([i], max_tokens=60))
        generation.read()
        guessed.append(generation.usage.guessed_tokens)
    assert guessed[-1] < guessed[0] / 2
    engine.close()


@pytest.mark.parametrize("answers", [1, 4])
def test_tries_take_a_hundredth_of_the_time(answers: int) -> None:
    """However many wait for the steps that they make longer."""
    tested = Speculation()
    tested.cost = Steady(1.0, 0.1)
    tested._chances = [0.01] * len(tested._chances)
    replies = [
        SimpleNamespace(
            sequence=SimpleNamespace(tokens=[1, 2] * 9, guesses=[], number=i),
            room=100, usage=SimpleNamespace(answer_s=0.0),
        )
        for i in range(answers)
    ]  # fmt: skip
    tried = 0
    for _ in range(2000):
        tested.guess(replies, answers, 60, lambda _, most: most)  # type: ignore[arg-type]
        for reply in replies:
            tried += len(reply.sequence.guesses)
            if reply.sequence.guesses:
                tested.told(reply.sequence.number, right=False)
            reply.sequence.guesses = []
            reply.usage.answer_s += 1.0
    assert tried * 0.1 == pytest.approx(2000 / 100, rel=0.1)
