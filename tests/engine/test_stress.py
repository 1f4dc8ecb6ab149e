"""Everything at once, by chance, checked after each step: answers are those of a request alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_requests import Numbers, any_request, odd, other_parity, request
from fake_executor import VOCAB, FakeExecutor, expected
from invariants import check_scheduler
from numpy.typing import NDArray

from squall.batch import Batch
from squall.engine.draft import Draft
from squall.engine.engine import Engine, EngineConfig
from squall.engine.request import Matcher, Piece, Request
from squall.engine.speculation import Cost, Speculation

ENDS = frozenset({5, 6})


class Cheap(Cost):
    """Steps at which guesses pay."""

    def observe(self, rows: int, seconds: float) -> None:  # noqa: ARG002
        super().observe(1, 1.0)
        self.fixed, self.row = 1.0, 1e-3


class Drafting(FakeExecutor):
    """A draft model; some of its logits are NaN. It has other weights, or the same."""

    def step(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().step(batch)
        logits[batch.tokens[batch.outputs] == 11] = np.nan
        return logits


class Watched:
    """A matcher that notices what it should not be told, and fails at a token if it is to."""

    def __init__(self, inner: Matcher, fails: tuple[str, int] | None) -> None:
        self.inner, self.ids, self._fails = inner, list[int](), fails

    def _fail(self, name: str) -> None:
        if self._fails is not None and self._fails == (name, len(self.ids)):
            raise ZeroDivisionError(name)

    @property
    def finished(self) -> bool:
        return self.inner.finished

    def allowed(self, guesses: Sequence[int]) -> Any:
        self._fail("allowed")
        return self.inner.allowed(guesses)

    def forced(self, most: int) -> list[int]:
        assert most > 0
        return [next(iter(self.ids[-1:]), 7)] * (len(self.ids) % 3)

    def accept(self, token: int) -> None:
        self._fail("accept")
        self.ids.append(token)
        self.inner.accept(token)


class Answer:
    """What is told of one, and what its matcher saw."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.matchers: list[Watched] = []
        self.leaves = -1

    def told(self) -> tuple[str, list[int], list[object], str | None, str]:
        pieces = self.pieces
        return (
            "".join(piece.text for piece in pieces),
            [i for piece in pieces for i in piece.ids],
            [sampled for piece in pieces for sampled in piece.logprobs],
            pieces[-1].finish_reason,
            repr(pieces[-1].error),
        )


class Failing:
    """A logits processor that fails in the end."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, logits: Any, ids: Any) -> None:
        if len(ids) == self._length:
            raise ZeroDivisionError("processor")
        logits[ids[-1]] -= 20


Kind = tuple[Request, Callable[[], Matcher] | None, tuple[str, int] | None]


def any_kind(rng: np.random.Generator, stems: list[list[int]]) -> Kind:
    wanted, chance = any_request(rng, stems), int(rng.integers(8))
    constraint = (None, odd, other_parity)[int(rng.integers(3))]
    fails = (("allowed", "accept")[chance % 2], int(rng.integers(9))) if chance < 2 else None
    if chance == 2:
        processors = (Failing(len(wanted.ids) + int(rng.integers(9))),)
        wanted = replace(wanted, sampling=replace(wanted.sampling, logits_processors=processors))
    if chance == 3:
        wanted = request([66, *wanted.ids[1:]])  # its logits are NaN
    return wanted, constraint, fails


def asked(engine: Engine, kind: Kind, **options: Any) -> tuple[Any, Answer]:
    wanted, constraint, fails = kind
    answer = Answer()

    def watched() -> Watched:
        assert constraint is not None
        answer.matchers.append(Watched(constraint(), fails))
        return answer.matchers[-1]

    given = replace(wanted, constraint=constraint and watched, **options)
    return engine.submit(given, answer.pieces.append), answer


def checking(engine: Engine) -> None:
    """After each step of the engine all that is always true is looked at."""
    step, stepper = engine._step, engine._stepper

    def checked() -> None:
        step()
        scheduler = engine._scheduler
        check_scheduler(scheduler)
        here = [*scheduler.running, *scheduler.waiting]
        assert {sequence.number for sequence in here} == stepper.replies.keys()
        assert not any(sequence.guesses for sequence in here)
        assert stepper._speculation._guessing.keys() <= stepper.replies.keys()
        for reply in stepper.replies.values():
            matcher, ids = reply._matcher, reply.sequence.tokens[reply.usage.prompt_tokens :]
            assert len(ids) == reply.usage.answer_tokens
            assert matcher is None or matcher.ids == ids  # type: ignore[attr-defined]

    engine._step = checked  # type: ignore[method-assign]


def proposer_of(rng: np.random.Generator, right: list[int], start: int) -> Any:
    wrong, fails = int(rng.integers(2, 5)), int(rng.integers(40))
    seed = int(rng.integers(99))

    def propose(ids: Sequence[int], most: int) -> list[int]:
        at, chance = len(ids) - start, np.random.default_rng(seed + len(ids))
        if at == fails:
            raise KeyError("proposer")
        return [(i + (chance.integers(wrong) == 0)) % VOCAB for i in right[at : at + most]]

    return propose


@pytest.mark.parametrize("kind", ["none", "lookup", "same", "other"])
@pytest.mark.parametrize("options", [{}, {"prefix_cache_n": 0}, {"no_kv_cache": True}])
def test_everything_at_once(
    rng: np.random.Generator, kind: str, options: dict[str, Any], nightly: bool
) -> None:
    """Guesses, grammars and ends of all kinds, preemption, and errors in a request's parts."""
    for _ in range(40 if nightly else 1):
        one_round(rng, kind, options)


def one_round(rng: np.random.Generator, kind: str, options: dict[str, Any]) -> None:
    def looping(ids: list[int]) -> NDArray[np.float32]:
        return expected([i % 5 for i in ids[-2:]])

    logits = looping if kind == "lookup" else expected
    stems = rng.integers(VOCAB, size=(3, 30)).tolist()
    kinds = [any_kind(rng, stems) for _ in range(12)]
    kinds += [  # several answers of one request
        (replace(wanted, sampling=replace(wanted.sampling, seed=seed)), *rest)
        for wanted, *rest in kinds[:3] for seed in range(2)
    ]  # fmt: skip
    kinds += [(request([i, 7], max_tokens=25, ignore_eos=True), odd, None) for i in range(3)]
    plain = FakeExecutor(logits=logits)
    plain.nan = 66
    alone = Engine(plain, EngineConfig(max_seqs=1), text=Numbers, stop_ids=ENDS)
    found = [asked(alone, one)[1] for one in kinds]
    assert alone.drain(60)
    right = [answer.told() for answer in found]
    alone.close()

    blocks = int(rng.integers(14, 40))
    executor = FakeExecutor(blocks=blocks, context=56, max_outputs=24, logits=logits)
    executor.nan = 66
    config = EngineConfig(max_seqs=6, prompt_batchsize=int(rng.integers(3, 32)), **options)
    speculation = Speculation(7, drafter(kind, blocks)) if kind != "none" else Speculation(0)
    speculation.cost = Cheap()
    engine = Engine(executor, config, text=Numbers, stop_ids=ENDS, speculation=speculation)
    checking(engine)
    executor.hold()
    answers = []
    for i in rng.permutation(len(kinds)):
        proposer = None
        if rng.integers(3) == 0:
            proposer = proposer_of(rng, right[i][1], len(kinds[i][0].ids))
        reply, answer = asked(engine, kinds[i], proposer=proposer)
        answers.append((int(i), reply, answer))
        if rng.integers(3) == 0:
            executor.let(int(rng.integers(1, 5)))
            if rng.integers(2):
                answers[rng.integers(len(answers))][1].cancel()
            if rng.integers(4) == 0:
                executor.let()
                engine.change_model(lambda: None)
                executor.hold()
    executor.let()
    assert engine.drain(60)
    for i, reply, answer in answers:
        check_answer(reply, answer, right[i])
    assert engine.alive
    counts = engine.stats().counts
    assert counts.finished + counts.cancelled + counts.errors == len(kinds)
    assert engine.stats().blocks_used == 0
    assert not speculation._guessing
    engine.close()


def drafter(kind: str, blocks: int) -> Draft | None:
    if kind == "lookup":
        return None
    logits = expected if kind == "same" else lambda ids: expected(ids[::-1])
    executor = Drafting(blocks=blocks, context=40, max_rows=16, max_outputs=16, logits=logits)
    draft = Draft(executor, VOCAB)
    draft.cost = Cheap()
    return draft


def check_answer(reply: Any, answer: Answer, right: Any) -> None:
    text, ids, logprobs, reason, error = told = answer.told()
    assert reply.usage.accepted_tokens <= reply.usage.guessed_tokens
    assert all(matcher.ids[: len(ids)] == ids[: len(matcher.ids)] for matcher in answer.matchers)
    assert len(answer.matchers) <= 1
    # Guesses and errors in parts that guesses ask at other times may end it elsewhere.
    if reason == "cancelled" or any("proposer" in e or "allowed" in e for e in (error, right[4])):
        for part, whole in ((text, right[0]), (ids, right[1]), (logprobs, right[2])):
            least = min(len(part), len(whole))
            assert part[:least] == whole[:least]
    else:
        assert told == right
