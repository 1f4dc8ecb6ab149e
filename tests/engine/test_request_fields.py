"""Requests are checked where they are made: what is wrong, and what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_requests import GREEDY, alone, request
from fake_executor import VOCAB, FakeExecutor, Silent

from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.memory import KvSize
from squall.engine.request import Request, Scoring, Span
from squall.errors import ContextLengthExceeded, InvalidRequest
from squall.opening import Opening

IMAGE = Span(1, 3, b"image")


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("ids", [[], (), np.array([], np.int32)], "the prompt is empty; give at least one token"),
        ("ids", ["text", b"bytes", 5, None], "must be token ids, such as a list"),
        ("ids", [[1, 2.0], ["1"], [True], [None], [-1], [2**31], [[1]], np.ones(2), {"a": 1}],
         "an id in ids is .*; it must be a whole number, between 0 and 2147483647"),
        ("stop_ids", [[1.5], [-1], ["1"], {True}], "an id in stop_ids is .*; it must be a whole"),
        ("max_tokens", [0, -1, 1.5, 10.0, "5", True, [1]],
         "max_tokens is .*; it must be a whole number, at least 1"),
        ("logprobs", [-1, 21, 1.0, "1", True],
         "logprobs is .*; it must be a whole number, between 0 and 20"),
        ("chunk", [0, 2.5, "8", False], "chunk is .*; it must be a whole number, at least 1"),
        ("sampling", [None, {"temperature": 0}], "sampling is .*; it must be a Sampling"),
        ("stop", ["text", None, ["text"]], "stop is .*; it must be a tuple of texts"),
        ("stop", [("a", ""), (b"a",), (1,)], "stop is .*; it must be texts, none of them empty"),
        ("ignore_eos", [0, 1, None, "no"], "ignore_eos is .*; it must be true or false"),
        ("truncate", [0, "yes"], "truncate is .*; it must be true or false"),
        ("continues", [1], "continues is .*; it must be true or false"),
        ("scope", [None, "tenant"], "scope is .*; it must be a CacheScope"),
        ("scoring", [3], "scoring is .*; it must be a Scoring or None"),
        ("spans", [[], None], "spans is .*; it must be a tuple of Spans"),
        ("spans", [((1, 3, b"a"),)], "spans is .*; it must be a tuple of Spans"),
        ("spans", [(Span(3, 6, b"a"),), (Span(5, 6, b"a"),)],
         "stop of a span is 6; it must be a whole number, between . and 5"),
        ("spans", [(IMAGE, IMAGE), (IMAGE, Span(2, 4, b"a"))],
         "start of a span is .; it must be a whole number, at least 3"),
        ("spans", [(Span(3, 4, b"a"), IMAGE)], "start of a span is 1; .* at least 4"),
        ("spans", [(Span(-1, 3, b"a"),)], "start of a span is -1; .* at least 0"),
        ("spans", [(Span(3, 3, b"a"),), (Span(3, 4.0, b"a"),)],
         "stop of a span is .*; .* between 4 and 5"),
    ],
)  # fmt: skip
def test_wrong_fields(field: str, values: list[Any], allowed: str) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=allowed):
            Request(**{"ids": [1, 2, 3, 4, 5], "sampling": GREEDY, field: value})


def test_a_scoring_begins_in_the_prompt() -> None:
    for start in (-1, 0.5):
        with pytest.raises(InvalidRequest, match=r"start of a scoring is .*; .* at least 0"):
            Scoring(print, start)  # type: ignore[arg-type]


def test_ids_of_any_kind_become_ints_that_nobody_can_change() -> None:
    given = [3, 4, 5]
    for ids in (given, tuple(given), range(3, 6), np.array(given), np.array(given, np.uint8),
                [np.int32(3), 4, np.int64(5)]):  # fmt: skip
        made = Request(ids=ids, sampling=GREEDY, stop_ids=ids)
        assert made.ids == (3, 4, 5)
        assert set(map(type, (*made.ids, *made.stop_ids))) == {int}
    made = Request(ids=given, sampling=GREEDY)
    given[0] = -7
    assert made.ids == (3, 4, 5)


def test_spans_side_by_side() -> None:
    made = request([1] * 9, spans=(IMAGE, Span(3, 4, b"a"), Span(8, 9, b"a")))
    assert len(made.spans) == 3


@pytest.fixture
def engine() -> Engine:
    return Engine(FakeExecutor(context=60), text=Silent)


def test_ids_that_the_model_does_not_have(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=f"the prompt has the id {VOCAB}; the model's go to"):
        engine.submit(request([1, VOCAB, 2]), print)
    assert engine.alive
    engine.close()


def test_an_answer_of_a_whole_numpy_number(engine: Engine) -> None:
    generation = Generation(engine, request([1], max_tokens=np.int64(3)))
    generation.read()
    assert generation.ids == alone(request([1], max_tokens=3))
    engine.close()


def test_a_span_is_not_cut_in_half(engine: Engine) -> None:
    """Of a prompt of 100 tokens 50 are kept, with 10 for the answer."""
    for spans, kept in [
        ((), 50),
        ((Span(40, 50, b"a"), Span(90, 95, b"b")), 50),
        ((Span(40, 51, b"a"), Span(90, 95, b"b")), 49),
        ((Span(0, 90, b"a"), Span(90, 95, b"b")), 10),
        ((Span(50, 100, b"a"),), 50),
    ]:
        wanted = request(list(range(80)) + [0] * 20, spans=spans, truncate=True, max_tokens=10)
        generation = Generation(engine, wanted)
        assert [
            (span.start + 100 - kept, span.stop + 100 - kept, span.digest)
            for span in generation._reply.sequence.spans
        ] == [(span.start, span.stop, span.digest) for span in spans if span.start >= 100 - kept]
        generation.read()
        assert generation.usage.prompt_tokens == kept
        assert generation.usage.dropped_tokens == 100 - kept
        assert generation.ids == alone(request(wanted.ids[-kept:]))
    with pytest.raises(ContextLengthExceeded):
        engine.submit(request([1] * 100, spans=(Span(40, 100, b"a"),), truncate=True), print)
    engine.close()


def test_spans_share_what_comes_before_them(engine: Engine) -> None:
    """A system prompt hits before an image, and a chat that goes on hits behind it."""
    text, image = list(range(10)), [7] * 13
    prompt = [*text, *image, *text]  # the image begins in the third block of four
    cached = []
    for digest, ids in [(b"cat", prompt), (b"dog", prompt), (b"cat", [*prompt, 5, 6])]:
        generation = Generation(engine, request(ids, spans=(Span(10, 23, digest),)))
        generation.read()
        assert generation.ids == alone(request(ids))
        cached.append(generation.usage.cached_tokens)
    assert cached == [0, 8, 32]
    engine.close()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (KvSize, {"tokens": "5"}), (KvSize, {"bytes": 1.5}), (KvSize, {"fraction": "1"}),
        (KvSize, {"block_size": None}), (EngineConfig, {"max_seqs": 1.5}),
        (EngineConfig, {"max_queue": True}), (EngineConfig, {"queue_timeout_s": "1"}),
        (EngineConfig, {"no_kv_cache": 1}), (Opening, {"kv": 5}), (Opening, {"engine": KvSize()}),
        (Opening, {"topology": 5}), (Opening, {"hub": "main"}),
    ],
)  # fmt: skip
def test_wrong_types_of_how_to_open(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"^{next(iter(wrong))} is .*; it must be "):
        kind(**wrong)
