"""Prompts with rows of images: the same bytes however steps are cut, and what images change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import VOCAB, WIDTH, write_base
from engine_requests import Told, told
from fake_executor import Silent
from numpy.typing import NDArray

from squall import decoder, executors
from squall.batch import Batch
from squall.checkpoints.folder import open_folder
from squall.engine.engine import Engine, EngineConfig
from squall.engine.generation import Generation
from squall.engine.request import Request, Span
from squall.engine.sampling import Sampling
from squall.errors import InvalidRequest
from squall.executors import Executor, Limits
from squall.recipes import Recipe, load
from squall.weights import WeightStore

sys.path.append(str(Path(__file__).parents[1]))
from reference_executor import ReferenceExecutor

Floats = NDArray[np.float32]
AXES = 3


def seeing(recipe: Recipe, *, axes: bool) -> Any:
    """The decoder with a place for images, perhaps with rotary positions of three axes."""
    found = replace(recipe.decoder, sees=True)
    if not axes:
        return found
    rope = found.layers[0].attention.rope
    assert rope is not None
    rope = replace(rope, axes=tuple(i % AXES for i in range(rope.dims // 2)))
    heads = replace(found.layers[0].attention, rope=rope)
    return replace(found, layers=tuple(replace(one, attention=heads) for one in found.layers))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_base(folder)
    return folder


def opened(
    base: Path, *, axes: bool, blocks: int = 64, kv: Any = "f32", rows: int = 64
) -> Executor:
    checkpoint = open_folder(base)
    recipe = load(checkpoint)
    program = decoder.compile(seeing(recipe, axes=axes), recipe.names, context=256)
    limits = Limits(rows={"tokens": rows, "outputs": 16}, blocks=blocks, kv_dtype=kv)
    pool = executors.thread_pool(1)
    return executors.open(program, WeightStore(checkpoint, exact=True), limits, pool=pool)


def image(seed: int, size: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((size, WIDTH)).astype(np.float32)


def rotary(size: int, spans: tuple[Span, ...]) -> NDArray[np.int32]:
    """As Qwen2-VL has it, of images that are one line each."""
    found, at, last = np.zeros((AXES, size), np.int32), 0, 0
    for span in (*spans, None):
        stop = size if span is None else span.start
        found[:, at:stop] = last + np.arange(stop - at)
        last += stop - at
        if span is not None:
            length = span.stop - span.start
            found[:, span.start : span.stop] = last
            found[2, span.start : span.stop] += np.arange(length)
            last, at = last + length, span.stop
    return found


def asked(*, mutual: bool, axes: bool) -> list[Request]:
    """Prompts with images that share beginnings, and others without."""
    rng = np.random.default_rng(5)
    found = []
    system = rng.integers(VOCAB, size=20).tolist()
    sizes = {1: 30, 2: 17, 3: 7}
    for number, names in enumerate([(1,), (2,), (1,), (1, 2), (3, 1), (), (2, 2), ()]):
        ids, spans = list(system), list[Span]()
        for name in names:
            ids += rng.integers(VOCAB, size=3 + number).tolist()
            rows, start = image(name, sizes[name]), len(ids)
            ids += [7] * len(rows)
            spans.append(Span(start, len(ids), bytes([name]) * 32, rows, mutual))
        ids += rng.integers(VOCAB, size=1 + 5 * (number % 3)).tolist()
        turned = rotary(len(ids), tuple(spans)) if axes and spans else None
        sampling = Sampling(temperature=number % 2 * 0.9, seed=number)
        found.append(
            Request(
                ids=ids,
                sampling=sampling,
                max_tokens=12,
                spans=tuple(spans),
                logprobs=3,
                rotary=turned,
            )
        )
    return found


def answers(executor: Executor, requests: list[Request], **config: Any) -> list[Told]:
    engine = Engine(executor, EngineConfig(**config), text=Silent)
    try:
        return [told(one) for one in [Generation(engine, request) for request in requests]]
    finally:
        engine.close()


KINDS = list(product((False, True), (False, True)))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"mutual={kind[0]},axes={kind[1]}")
def kind(request: pytest.FixtureRequest) -> tuple[bool, bool]:
    found: tuple[bool, bool] = request.param
    return found


@pytest.fixture
def wanted(base: Path, kind: tuple[bool, bool]) -> list[Told]:
    """Each answer alone, from nothing."""
    executor = opened(base, axes=kind[1])
    return [
        answers(executor, [one], prefix_cache_n=0)[0] for one in asked(mutual=kind[0], axes=kind[1])
    ]


def test_the_same_however_steps_are_cut(
    base: Path, kind: tuple[bool, bool], wanted: list[Told]
) -> None:
    requests = asked(mutual=kind[0], axes=kind[1])
    executor = opened(base, axes=kind[1])
    assert answers(executor, requests) == wanted
    assert answers(executor, requests, prompt_batchsize=5) == wanted
    assert answers(executor, requests[::-1], max_seqs=3)[::-1] == wanted
    few = opened(base, axes=kind[1], blocks=14, rows=40)
    assert answers(few, requests * 2, max_seqs=4) == wanted * 2


def test_cached_and_evicted(base: Path, kind: tuple[bool, bool], wanted: list[Told]) -> None:
    requests = asked(mutual=kind[0], axes=kind[1])
    engine = Engine(opened(base, axes=kind[1], blocks=24), EngineConfig(), text=Silent)
    try:
        for request, answer in list(zip(requests, wanted, strict=True)) * 3:
            assert told(Generation(engine, request)) == answer
        again = Generation(engine, requests[-2])
        assert told(again) == wanted[-2]
        assert again.usage.cached_tokens > 0
    finally:
        engine.close()


def test_another_image_is_another_prompt(base: Path) -> None:
    """The same text with another image shares what is before the image, and no more."""
    engine = Engine(opened(base, axes=False), EngineConfig(), text=Silent)
    one = asked(mutual=False, axes=False)[0]
    (span,) = one.spans
    ids = [*range(40), *[7] * 30, *range(20)]
    at = replace(span, start=40, stop=70)
    other = replace(at, rows=image(9, 30), digest=b"other")
    try:
        first = told(Generation(engine, replace(one, ids=ids, spans=(at,))))
        changed = Generation(engine, replace(one, ids=ids, spans=(other,)))
        assert told(changed) != first
        assert changed.usage.cached_tokens == 32
        same = Generation(engine, replace(one, ids=ids, spans=(at,)))
        assert told(same) == first
        assert same.usage.cached_tokens == 80
    finally:
        engine.close()


def test_rows_are_what_the_reference_makes_of_them(base: Path, kind: tuple[bool, bool]) -> None:
    """The whole prompt by hand, in one step of the NumPy executor."""
    mutual, axes = kind
    checkpoint = open_folder(base)
    recipe = load(checkpoint)
    program = decoder.compile(seeing(recipe, axes=axes), recipe.names, context=256)
    reference = ReferenceExecutor(program, checkpoint, blocks=16)
    for request in asked(mutual=mutual, axes=axes):
        size = len(request.ids)
        spans = np.stack([np.zeros(size, np.int32), np.arange(1, size + 1, dtype=np.int32)])
        overlay, count = np.full(size, -1, np.int32), 0
        for span in request.spans:
            length = span.stop - span.start
            overlay[span.start : span.stop] = np.arange(count, count + length)
            count += length
            if mutual:
                spans[1, span.start : span.stop] = span.stop
        rows = [span.rows for span in request.spans if span.rows is not None]
        logits = reference.step(
            Batch(
                tokens=np.array(request.ids, np.int32),
                positions=np.arange(size, dtype=np.int32),
                bounds=np.array([0, size], np.int32),
                block_tables=np.arange(16, dtype=np.int32)[None],
                outputs=np.array([size - 1], np.int32),
                spans=spans,
                rotary=request.rotary,
                images=np.concatenate(rows) if rows else None,
                overlay=overlay,
            )
        )
        (first,) = answers(opened(base, axes=axes), [replace(request, max_tokens=1)])
        row = logits[0] - logits[0].max()
        expected = row - np.log(np.exp(row).sum())
        (sampled,) = first[2]
        assert abs(sampled.logprob - expected[sampled.token]) < 1e-4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda span: replace(span, rows=span.rows[:-1]), "rows of shape"),
        (lambda span: replace(span, rows=span.rows[:, :-1]), "rows of shape"),
        (
            lambda span: replace(span, stop=span.start + 90, rows=image(1, 90), mutual=True),
            "room for",
        ),
    ],
)
def test_wrong_rows(base: Path, change: Callable[[Span], Span], message: str) -> None:
    one = replace(asked(mutual=False, axes=False)[0], ids=[5] * 200)
    with pytest.raises(InvalidRequest, match=message):
        answers(opened(base, axes=False, rows=100), [replace(one, spans=(change(one.spans[0]),))])
