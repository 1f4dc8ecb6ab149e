"""The engine on an executor that answers with what it can see: every schedule, the same tokens."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from engine_requests import Numbers, alone, idle, request, settle
from fake_executor import VOCAB, FakeExecutor, Silent, expected
from numpy.typing import NDArray

from squall.batch import Batch
from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.request import CacheScope, Piece, Scoring
from squall.engine.sampling import Sampling
from squall.errors import (
    ContextLengthExceeded,
    EngineStopped,
    InvalidRequest,
    OutOfMemory,
    QueueFull,
    SamplingFailed,
)


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
def engine(executor: FakeExecutor) -> Iterator[Engine]:
    engine = Engine(executor, EngineConfig(max_seqs=4, max_queue=4), text=Numbers)
    yield engine
    executor.let()
    engine.close()


@pytest.mark.parametrize("blocks", [12, 64])
@pytest.mark.parametrize("chunk", [1, 7, 32])
@pytest.mark.parametrize("options", [{}, {"prefix_cache_n": 0}, {"no_kv_cache": True}])
def test_any_schedule_gives_the_same_tokens(
    rng: np.random.Generator, blocks: int, chunk: int, options: dict[str, bool]
) -> None:
    """rows 10, 13: batched, chunked, preempted, after a prefix hit."""
    executor = FakeExecutor(blocks=blocks, context=48)
    config = EngineConfig(max_seqs=6, prompt_batchsize=chunk, **options)  # type: ignore[arg-type]
    stems = rng.integers(VOCAB, size=(3, 30)).tolist()
    wanted = [
        request(
            stems[rng.integers(3)][: rng.integers(31)] + rng.integers(VOCAB, size=2).tolist(),
            max_tokens=int(rng.integers(1, 16)),
            sampling=Sampling(float(rng.integers(3)), top_p=0.9, seed=int(rng.integers(9))),
        )
        for _ in range(25 if "no_kv_cache" in options else 40)  # each token costs a whole prompt
    ]
    engine = Engine(executor, config, text=Silent)
    try:
        for _ in range(2):
            generations = [Generation(engine, one) for one in wanted]
            for one, generation in zip(wanted, generations, strict=True):
                generation.read()
                assert generation.ids == alone(one)
                assert generation.finish_reason == "length"
        stats = engine.stats()
        # One row of prompts a step lets few run at a time.
        unsure = (chunk, blocks) == (1, 12) or ("no_kv_cache" in options and blocks == 12)
        assert unsure or (stats.preemptions > 0) == (blocks == 12)
        assert (stats.counts.cached_tokens > 0) == (not options)
        settle(engine)
        assert idle(engine)
    finally:
        engine.close()


def test_pieces(engine: Engine) -> None:
    """Text, ids and log-probabilities of all pieces together are the answer's."""
    wanted = request(
        [1, 2], max_tokens=30, sampling=Sampling(temperature=1, top_p=1, seed=0), logprobs=3
    )
    pieces = list(Generation(engine, wanted))
    ids = [token for piece in pieces for token in piece.ids]
    assert ids == alone(wanted)
    assert "".join(piece.text for piece in pieces) == "".join(f"{token} " for token in ids)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    told = [sampled for piece in pieces for sampled in piece.logprobs]
    assert [sampled.token for sampled in told] == ids
    for stop, sampled in enumerate(told):
        logits = expected([1, 2, *ids[:stop]]).astype(np.float64)
        exact = logits - np.logaddexp.reduce(logits)
        assert sampled.logprob == pytest.approx(exact[sampled.token])
        assert [value for _, value in sampled.top] == pytest.approx(sorted(exact)[:-4:-1])


def test_row_16_stops(executor: FakeExecutor) -> None:
    ids = alone(request([3]))
    assert len(set(ids[:5])) == 5
    engine = Engine(executor, text=Numbers, stop_ids=frozenset({ids[4]}))
    cases: list[tuple[dict[str, object], int]] = [
        ({}, 5),
        ({"ignore_eos": True}, 10),
        ({"stop_ids": frozenset({ids[2]})}, 3),
        ({"stop": (str(ids[1]),)}, 2),
    ]
    for options, length in cases:
        generation = Generation(engine, request([3], **options))
        text = generation.read()
        assert generation.ids == ids[:length]
        assert generation.finish_reason == ("stop" if length < 10 else "length")
        assert text == "".join(f"{i} " for i in ids[: length - (length < 10)])
    few = Generation(engine, request([3], sampling=Sampling(temperature=0, seed=0, min_tokens=7)))
    few.read()
    assert len(few.ids) >= 7
    assert ids[4] not in few.ids[:7]
    engine.close()


def test_scoring(engine: Engine) -> None:
    ids = list(range(50))
    for start, chunk in itertools.product((0, 17, 49), (None, 1, 30)):
        engine.change_model(lambda: None)
        found: list[np.ndarray] = []

        def take(first: int, rows: np.ndarray, found: list[np.ndarray] = found) -> None:
            assert first == start + len(found)  # noqa: B023
            found.extend(rows)

        scored = request(ids, max_tokens=2, scoring=Scoring(take, start), chunk=chunk)
        generation = Generation(engine, scored)
        generation.read()
        assert np.array_equal(found, [expected(ids[: i + 1]) for i in range(start, 50)])
        assert generation.ids == alone(request(ids, max_tokens=2))


def test_multi_turn_reuses_answers_too(engine: Engine) -> None:
    first = Generation(engine, request(list(range(20)), max_tokens=20))
    first.read()
    second = Generation(engine, request([*range(20), *first.ids, 5]))
    second.read()
    assert second.usage.cached_tokens == 36


def test_row_s17_scopes(engine: Engine) -> None:
    for tenant, cached in [("a", 0), ("b", 0), ("a", 16), ("", 0)]:
        generation = Generation(engine, request([4] * 20, scope=CacheScope(tenant=tenant)))
        generation.read()
        assert generation.usage.cached_tokens == cached


@pytest.mark.parametrize("state", ["queued", "prefill", "decode"])
def test_row_1_disconnects(engine: Engine, executor: FakeExecutor, state: str) -> None:
    """Who leaves is gone, with all blocks, before the next step."""
    ends: list[tuple[int, str]] = []

    def sink(piece: Piece) -> None:
        if piece.finish_reason is not None:
            ends.append((len(executor.rows), piece.finish_reason))

    for _ in range(20):
        executor.hold()
        ahead = [Generation(engine, request([i])) for i in range(4 * (state == "queued"))]
        answers = [engine.submit(request([i] * 60, max_tokens=9), sink) for i in range(4, 7)]
        executor.wait()
        if state != "prefill":
            executor.let(8)
        steps = executor.wait()
        tokens = [answer.usage.answer_tokens for answer in answers]
        assert all(tokens) if state == "decode" else not any(tokens)
        assert all(answer.finish_reason is None for answer in answers)
        for answer in answers:
            answer.cancel()
            answer.cancel()
        executor.let()
        for generation in ahead:
            assert len(generation.read()) > 0
        settle(engine)
        assert ends == [(steps + 1, "cancelled")] * 3
        assert idle(engine)
        ends.clear()
        engine.change_model(lambda: None)
    assert engine.stats().counts.cancelled == 60


def test_letting_go_cancels(engine: Engine) -> None:
    generation = Generation(engine, request([1], max_tokens=200))
    next(generation)
    del generation
    gc.collect()
    settle(engine)
    assert idle(engine)
    assert engine.stats().counts.cancelled == 1


def test_row_2_one_clients_cancel_is_its_own(engine: Engine) -> None:
    wanted = request([1], max_tokens=100)
    stays = Generation(engine, wanted)
    for i in range(20):
        Generation(engine, request([i], max_tokens=50)).close()
    stays.read()
    assert stays.ids == alone(wanted)


def test_row_3_an_error_in_a_step_ends_all_and_is_told(executor: FakeExecutor) -> None:
    deaths: list[BaseException] = []
    dead = threading.Event()

    def on_death(error: BaseException) -> None:
        deaths.append(error)
        dead.set()

    engine = Engine(executor, EngineConfig(max_seqs=2), on_death=on_death, text=Silent)
    executor.hold()
    generations = [Generation(engine, request([i])) for i in range(6)]
    executor.fail = KeyboardInterrupt("gone")
    executor.let()
    for generation in generations:
        with pytest.raises(EngineStopped, match="KeyboardInterrupt: gone"):
            generation.read()
        assert generation.finish_reason == "error"
    assert dead.wait(10)
    assert deaths == [executor.fail]
    assert not engine.alive
    with pytest.raises(EngineStopped, match="open the model again"):
        engine.submit(request([1]), print)
    assert engine.stats().counts.errors == 6
    engine.close()


class Full(FakeExecutor):
    """Finds no memory for its third step, and all that was in its cache is lost."""

    def step(self, batch: Batch) -> NDArray[np.float32]:
        if len(self.rows) == 2:
            self.rows.append([])
            self.slots[:] = -1
            raise OutOfMemory("full")
        return super().step(batch)


def test_a_step_without_memory_ends_those_that_run() -> None:
    engine = Engine(executor := Full(), EngineConfig(max_seqs=2), text=Numbers)
    executor.hold()
    wanted = [request([1, 2, 3, 4, 5, i]) for i in range(3)]
    first, second, waits = (Generation(engine, one) for one in wanted)
    executor.let()
    for generation in (first, second):
        with pytest.raises(OutOfMemory, match="full"):
            generation.read()
    waits.read()
    assert waits.ids == alone(wanted[2])
    assert waits.usage.cached_tokens == 0
    assert engine.alive
    engine.close()


def test_a_step_without_memory_ends_all_ranks() -> None:
    """The others may be in the middle of it."""
    executor = Full()
    executor.lost = None  # type: ignore[attr-defined]
    engine = Engine(executor, text=Numbers)
    with pytest.raises(EngineStopped, match="OutOfMemory: full"):
        Generation(engine, request([1])).read()
    assert not engine.alive
    engine.close()


def test_row_4_one_bad_request_harms_no_other(engine: Engine) -> None:
    class Wrong(Exception):
        pass

    def raises(*_: object) -> None:
        raise Wrong

    wanted = request([1], max_tokens=100)
    stays = Generation(engine, wanted)
    for _ in range(5):
        engine.submit(request([2]), raises)
        with pytest.raises(Wrong):
            Generation(engine, request([3], scoring=Scoring(raises))).read()
    stays.read()
    assert stays.ids == alone(wanted)
    settle(engine)
    assert idle(engine)
    assert engine.stats().counts.errors == 10


def test_row_18_too_long(engine: Engine) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"256 tokens and an answer .* 256 tokens"):
        Generation(engine, request([1] * 256))
    for max_tokens, kept in [(10, 246), (None, 246), (300, 246), (200, 56)]:
        wanted = request(list(range(90)) * 4, truncate=True, max_tokens=max_tokens)
        generation = Generation(engine, wanted)
        generation.read()
        assert generation.usage.prompt_tokens == kept
        assert generation.usage.dropped_tokens == 360 - kept
        last = request(list(wanted.ids)[-kept:], max_tokens=len(generation.ids))
        assert generation.ids == alone(last)
        assert len(generation.ids) == min(max_tokens or 10, 256 - kept)


def test_few_blocks_bound_a_request() -> None:
    engine = Engine(FakeExecutor(blocks=5, block_size=4), text=Silent)
    with pytest.raises(ContextLengthExceeded, match="20 tokens"):
        engine.submit(request([1] * 20), print)
    generation = Generation(engine, request([1] * 15, max_tokens=None))
    generation.read()
    assert (len(generation.ids), generation.finish_reason) == (5, "length")
    engine.close()


def test_row_34_a_full_queue_refuses(engine: Engine, executor: FakeExecutor) -> None:
    executor.hold()
    generations = [Generation(engine, request([i])) for i in range(8)]
    with pytest.raises(QueueFull, match="8 requests run or wait") as caught:
        engine.submit(request([1]), print)
    assert caught.value.retry_after_s >= 1
    executor.let()
    for generation in generations:
        generation.read()
    settle(engine)


def test_row_34_who_waits_too_long_is_refused(executor: FakeExecutor) -> None:
    engine = Engine(executor, EngineConfig(max_seqs=1, queue_timeout_s=0.05), text=Silent)
    executor.hold()
    first, second = Generation(engine, request([0])), Generation(engine, request([1]))
    executor.wait()
    time.sleep(0.1)
    executor.let()
    with pytest.raises(QueueFull, match="no place became free"):
        second.read()
    first.read()
    assert first.ids == alone(request([0]))
    settle(engine)
    engine.close()


def test_waiting_tokens_are_bounded(executor: FakeExecutor) -> None:
    engine = Engine(executor, EngineConfig(max_seqs=1, max_queue_tokens=100), text=Silent)
    executor.hold()
    generations = [Generation(engine, request([0]))]
    executor.wait()
    generations.append(Generation(engine, request([1] * 150)))
    with pytest.raises(QueueFull, match="100 waiting tokens"):
        engine.submit(request([2]), print)
    executor.let()
    for i, generation in enumerate(generations):
        generation.read()
        assert generation.ids == alone(request([[0], [1] * 150][i]))
    engine.close()


def test_row_35_threads_and_tasks(engine: Engine) -> None:
    """32 threads and 32 tasks at once, on an engine with a longer queue."""
    wide = Engine(engine.executor, EngineConfig(max_seqs=16), text=Silent)
    wanted = [request([i], max_tokens=20) for i in range(64)]
    found: list[list[int]] = [[]] * 64

    def in_thread(i: int) -> None:
        generation = Generation(wide, wanted[i])
        generation.read()
        found[i] = generation.ids

    async def in_task(i: int) -> None:
        generation = Generation(wide, wanted[i])
        found[i] = [token async for piece in generation for token in piece.ids]

    async def tasks() -> None:
        await asyncio.gather(*(in_task(i) for i in range(32, 64)))

    threads = [threading.Thread(target=in_thread, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    asyncio.run(tasks())
    for thread in threads:
        thread.join(30)
    assert found == [alone(one) for one in wanted]
    wide.close()


def test_row_39_drain(engine: Engine, executor: FakeExecutor) -> None:
    executor.hold()
    generations = [Generation(engine, request([i])) for i in range(6)]
    assert not engine.drain(0.01)
    with pytest.raises(EngineStopped, match="shutting down"):
        engine.submit(request([1]), print)
    executor.let()
    assert engine.drain(30)
    for i, generation in enumerate(generations):
        generation.read()
        assert generation.ids == alone(request([i]))
    assert idle(engine)


def test_nan_logits_end_their_request_alone() -> None:
    class Broken(FakeExecutor):
        def step(self, batch: Batch) -> NDArray[np.float32]:
            logits = super().step(batch)
            for i, row in enumerate(batch.outputs):
                if batch.tokens[row] == 13:
                    logits[i, 5] = np.nan
            return logits

    engine = Engine(Broken(), EngineConfig(max_seqs=4), text=Silent)
    good, bad = Generation(engine, request([1])), Generation(engine, request([13]))
    with pytest.raises(SamplingFailed, match="the model's logits are NaN"):
        bad.read()
    good.read()
    assert good.ids == alone(request([1]))
    assert idle(engine)
    engine.close()


def test_close_cancels_what_is_left(engine: Engine) -> None:
    pieces: list[Piece] = []
    answers = [engine.submit(request([i], max_tokens=250), pieces.append) for i in range(6)]
    engine.close()
    assert {answer.finish_reason for answer in answers} == {"cancelled"}
    assert idle(engine)
    with pytest.raises(EngineStopped):
        engine.submit(request([1]), print)
    engine.close()


def test_row_32_nothing_is_left_of_an_engine_without_users() -> None:
    executor = FakeExecutor()
    engine = Engine(executor, text=Silent)
    Generation(engine, request([1])).read()
    thread = engine._thread
    gone = weakref.ref(engine)
    del engine
    assert thread is not None
    thread.join(10)
    gc.collect()
    assert gone() is None


def test_stats(engine: Engine, executor: FakeExecutor) -> None:
    executor.hold()
    generations = [Generation(engine, request([i] * 10)) for i in range(6)]
    executor.wait()
    before = engine.stats()
    assert before.running + before.waiting == 6
    assert before.stalled_s > 0
    executor.let()
    for generation in generations:
        generation.read()
    settle(engine)
    counts, stats = engine.stats().counts, engine.stats()
    assert (counts.prompt_tokens, counts.answer_tokens, counts.finished) == (61, 61, 7)
    assert counts.steps == len(executor.rows)
    assert 0 < counts.executor_s <= counts.step_s
    assert stats.blocks == executor.blocks
    assert stats.blocks_cached == 6 * (19 // 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seqs": 0}, "max_seqs is 0"),
        ({"max_seqs": 17}, "room for 16"),
        ({"prompt_batchsize": 0}, "prompt_batchsize is 0"),
        ({"prefix_cache_n": -1}, "prefix_cache_n is -1"),
    ],
)
def test_wrong_configuration(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Engine(FakeExecutor(), EngineConfig(**options), text=Silent)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"ids": []}, {"max_tokens": 0}, {"chunk": 0}, {"logprobs": -1}]
)
def test_wrong_requests(options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        request(**({"ids": [1]} | options))  # type: ignore[arg-type]


def test_row_33_a_long_prompt_while_answers_run() -> None:
    """Rows are counted, not seconds."""
    tokens = 6000
    executor = FakeExecutor(blocks=600, block_size=16, context=8192, max_rows=512, max_outputs=64)
    engine = Engine(executor, EngineConfig(max_seqs=16), text=Silent)
    streams = [Generation(engine, request([i + 1], max_tokens=2000)) for i in range(8)]
    executor.hold()
    executor.wait()
    long = Generation(engine, request(list(range(50)) * (tokens // 50), max_tokens=1))
    before = len(executor.rows)
    executor.let()
    long.read()
    busy = [step for step in executor.rows[before:] if len(step) == 9]
    assert len(busy) >= tokens // 512
    assert all(step[:8] == [1] * 8 and step[8] >= 16 for step in busy[:-1])
    assert sum(step[8] for step in busy) == tokens
    for stream in streams:
        stream.close()
    engine.close()
