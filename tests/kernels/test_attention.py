"""Attention over spans of any shape, and of memories, on every instruction set, against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from native_executor import in_memory, opened
from reference_executor import ReferenceExecutor
from spans import Spans, any_spans
from squall import _native
from squall.batch import Sequences
from squall.errors import InvalidRequest
from squall.executors import CacheType
from squall.program import Attend, Builder, CacheLayer, Index, Program, Recall

Array = NDArray[np.float32]
HEADS, KV_HEADS, BLOCK, BLOCKS = 4, 2, 16, 40
# How far the cache's own rounding moves a mean of values.
BOUNDS: dict[CacheType, float] = {"f32": 1e-5, "f16": 5e-3, "q8_0": 5e-2}

isas = pytest.mark.parametrize("isa", _native.isas())
dims = pytest.mark.parametrize("dim", [1, 17, 72, 80, 88, 128])


def attention(
    dim: int, *, cached: bool, window: int | None = None, keys: str = "tokens"
) -> Program:
    b = Builder()
    q = b.value("q", HEADS * dim)
    k, v = (b.value(name, KV_HEADS * dim, keys) for name in "kv")
    op = Attend(
        b.value("out", q.width), q, k, v, Index("spans", axes=2), 0 if cached else None,
        HEADS, KV_HEADS, dim, dim**-0.5, window, None,
    )  # fmt: skip
    caches = (CacheLayer(KV_HEADS, dim),) if cached else ()
    return b.build(b.emit(op), inputs=(q, k, v), caches=caches, context=BLOCK * BLOCKS)


def drawn(rng: np.random.Generator, dim: int, rows: int, keys: int) -> dict[str, Any]:
    sizes = {"q": (rows, HEADS * dim), "k": (keys, KV_HEADS * dim), "v": (keys, KV_HEADS * dim)}
    return {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}


def image_spans(rows: int, images: Sequence[tuple[int, int]]) -> Spans:
    """Causal, but rows of an image see all of it."""
    spans = np.stack([np.zeros(rows), np.arange(1, rows + 1)]).astype(np.int32)
    for start, stop in images:
        spans[1, start:stop] = stop
    return spans


@isas
@dims
def test_rows_of_a_run_see_any_spans(
    isa: str, dim: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of another space than the keys, as a perceiver's latents are."""
    monkeypatch.setenv("SQUALL_ISA", isa)
    program, checkpoint = attention(dim, cached=False, keys="patches"), in_memory({})
    executor = opened(program, checkpoint, {"tokens": 512, "patches": 600})
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    for rows, keys in ((0, 5), (1, 1), (2, 300), (3, 0), (5, 64), (23, 577), (130, 40)):
        inputs = drawn(rng, dim, rows, keys) | {"spans": any_spans(rng, rows, keys)}
        found, wanted = executor.run(inputs)["out"], reference.run(inputs)["out"]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        empty = np.equal(*inputs["spans"])
        assert not found[empty].any()
        for row in (0, rows // 2, rows - 1) if rows else ():
            one = {"q": inputs["q"][[row]], "spans": inputs["spans"][:, [row]]}
            assert executor.run(inputs | one)["out"].tobytes() == found[row].tobytes()


@isas
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("window", [1, 20, 70])
def test_a_window_ends_at_the_rows_own_position(
    isa: str,
    cached: bool,
    window: int,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of an image see the rest of it; what is before them only within the window."""
    monkeypatch.setenv("SQUALL_ISA", isa)
    dim, rows = 72, 150
    program, checkpoint = attention(dim, cached=cached, window=window), in_memory({})
    executor = opened(program, checkpoint, {"tokens": 512}, blocks=BLOCKS, kv_dtype="f32")
    reference = ReferenceExecutor(program, checkpoint, blocks=BLOCKS)
    spans = image_spans(rows, [(3, 40), (60, 130)])
    spans[1, 145] = 100  # what the window leaves of it is nothing
    inputs = drawn(rng, dim, rows, rows) | {"spans": spans}
    at = sequences([(0, rows)]) if cached else None
    found, wanted = executor.run(inputs, at)["out"], reference.run(inputs, at)["out"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    own = np.arange(rows)
    begin = np.maximum(spans[0], own + 1 - window)
    plain = attention(dim, cached=False)
    same = opened(plain, checkpoint, {"tokens": 512}).run(
        inputs | {"spans": np.stack([np.minimum(begin, spans[1]), spans[1]])}
    )["out"]
    assert found.tobytes() == same.tobytes()


def sequences(runs: Sequence[tuple[int, int]], memories: tuple[object, ...] = ()) -> Sequences:
    """Sequences at positions start:stop, whose blocks lie apart and out of order."""
    each = BLOCKS // len(runs)
    return Sequences(
        positions=np.concatenate([np.arange(*run) for run in runs]).astype(np.int32),
        bounds=np.cumsum([0, *(stop - start for start, stop in runs)]).astype(np.int32),
        block_tables=np.arange(BLOCKS)[::-1][: each * len(runs)]
        .reshape(len(runs), each)
        .astype(np.int32),
        memories=memories,
    )


@isas
@dims
@pytest.mark.parametrize("kv", BOUNDS)
def test_cached_rows_see_each_other_in_chunks(
    isa: str,
    dim: int,
    kv: CacheType,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An image's end is in the step of its rows; where else steps are cut changes no byte."""
    monkeypatch.setenv("SQUALL_ISA", isa)
    rows, images = 300, [(5, 30), (40, 41), (100, 290)]
    program, checkpoint = attention(dim, cached=True), in_memory({})
    executor = opened(program, checkpoint, {"tokens": 512}, blocks=BLOCKS, kv_dtype=kv)
    reference = ReferenceExecutor(program, checkpoint, blocks=BLOCKS)
    spans, given = image_spans(rows, images), drawn(rng, dim, rows, rows)
    spans[:, 297] = 7  # nothing
    whole = executor.run(given | {"spans": spans}, sequences([(0, rows)]))["out"]
    wanted = reference.run(given | {"spans": spans}, sequences([(0, rows)]))["out"]
    np.testing.assert_allclose(whole, wanted, atol=BOUNDS[kv])
    assert not whole[297].any()
    for cuts in ([30, 100, 300], [3, 40, 41, 290, 291, 292, 300]):
        parts = [
            executor.run(
                {name: x[start:stop] for name, x in given.items()}
                | {"spans": np.ascontiguousarray(spans[:, start:stop])},
                sequences([(start, stop)]),
            )["out"]
            for start, stop in zip([0, *cuts], cuts, strict=False)
        ]
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_what_is_not_in_the_cache_is_not_seen(rng: np.random.Generator) -> None:
    executor = opened(attention(8, cached=True), in_memory({}), {"tokens": 64}, blocks=BLOCKS)
    spans = image_spans(20, [(10, 20)])
    inputs = drawn(rng, 8, 20, 20) | {"spans": spans}
    executor.run(inputs, sequences([(0, 20)]))
    cut = {name: x[:15] for name, x in inputs.items() if name != "spans"}
    for bad in (np.ascontiguousarray(spans[:, :15]), image_spans(15, [(0, 21)])):
        with pytest.raises(InvalidRequest, match="a position that is not there"):
            executor.run(cut | {"spans": bad}, sequences([(0, 15)]))
    for column in ((3, 2), (-1, 2), (0, -5)):
        bad = spans.copy()
        bad[:, 4] = column
        with pytest.raises(InvalidRequest, match=r"not there|negative"):
            executor.run(inputs | {"spans": bad}, sequences([(0, 20)]))


# ---- memories ----


def recalling(dim: int) -> Program:
    """Two memories, the second with heads of its own."""
    b, seen = Builder(), Index("seen", axes=2)
    q = b.value("q", HEADS * dim)
    outs = [
        b.emit(Recall(b.value(f"out{i}", q.width), q, seen, i, HEADS, kv, dim, dim**-0.5))
        for i, kv in enumerate((KV_HEADS, HEADS))
    ]
    memories = (CacheLayer(KV_HEADS, dim), CacheLayer(HEADS, dim))
    return b.build(*outs, inputs=(q,), context=BLOCK * BLOCKS, memories=memories)


def fill(memories: Sequence[Any], rng: np.random.Generator, dim: int, rows: int) -> None:
    """The same rows in two pieces."""
    keys, values = (
        [rng.standard_normal((rows, heads * dim), np.float32) for heads in (KV_HEADS, HEADS)]
        for _ in range(2)
    )
    for memory in memories:
        for first, last in ((rows // 3, rows), (0, rows // 3)):
            memory.write(first, *([x[first:last] for x in xs] for xs in (keys, values)))


@isas
@pytest.mark.parametrize("dim", [17, 72, 128])
@pytest.mark.parametrize("kv", BOUNDS)
def test_sequences_recall_their_memories(
    isa: str,
    dim: int,
    kv: CacheType,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With and without one, one shared by two, rows that see nothing; alone and together."""
    monkeypatch.setenv("SQUALL_ISA", isa)
    program, checkpoint = recalling(dim), in_memory({})
    executor = opened(program, checkpoint, {"tokens": 512}, blocks=BLOCKS, kv_dtype=kv)
    reference = ReferenceExecutor(program, checkpoint, blocks=1)
    made = []
    for rows in (9, 700):
        made.append((executor.memory(rows), reference.memory(rows)))
        fill(made[-1], rng, dim, rows)
    which = (1, None, 0, 1, None)
    runs = [(0, 40), (7, 8), (3, 5), (90, 91), (0, 3)]
    pairs = [(None, None) if i is None else made[i] for i in which]
    own, expected = (sequences(runs, memories) for memories in zip(*pairs, strict=True))
    q = rng.standard_normal((int(own.bounds[-1]), HEADS * dim), np.float32)
    seen = np.zeros((2, len(q)), np.int32)
    for i, start, stop in zip(which, own.bounds, own.bounds[1:], strict=False):
        seen[1, start:stop] = 650 if i is None else rng.integers(0, (9, 700)[i] + 1, stop - start)
    seen[:, 2] = 4
    inputs = {"q": q, "seen": seen}
    found, wanted = executor.run(inputs, own), reference.run(inputs, expected)
    for name, out in wanted.items():
        np.testing.assert_allclose(found[name], out, atol=BOUNDS[kv])
        assert not found[name][[2, *range(own.bounds[1], own.bounds[2]), -1]].any()
        for s, run in enumerate(runs):
            rows = slice(own.bounds[s], own.bounds[s + 1])
            alone = sequences([run], (own.memories[s],))
            part = {"q": q[rows], "seen": np.ascontiguousarray(seen[:, rows])}
            assert executor.run(part, alone)[name].tobytes() == found[name][rows].tobytes()
    nothing = executor.run(inputs, sequences(runs))
    assert not any(out.any() for out in nothing.values())


def test_memories_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    def make(dim: int, **more: Any) -> Any:
        return opened(recalling(dim), in_memory({}), {"tokens": 64}, blocks=BLOCKS, **more)

    executor, same = make(16), make(16)
    q, seen = rng.standard_normal((2, HEADS * 16), np.float32), np.array([[0, 0], [9, 9]], np.int32)
    inputs = {"q": q, "seen": seen}
    memory = same.memory(10)
    fill([memory], rng, 16, 10)
    executor.run(inputs, sequences([(0, 2)], (memory,)))
    others = (make(17), make(16, kv_dtype="q8_0"), make(16, block_size=32))
    for other in others:
        with pytest.raises(InvalidRequest, match="made for another model"):
            executor.run(inputs, sequences([(0, 2)], (other.memory(10),)))
    with pytest.raises(InvalidRequest, match="a position that is not there"):
        executor.run(inputs, sequences([(0, 2)], (same.memory(8),)))
    for memories in ((memory, memory), (object(),)):
        with pytest.raises(InvalidRequest):
            executor.run(inputs, sequences([(0, 2)], memories))
    for rows in (0, -1, 2**31, 2**70):
        with pytest.raises(InvalidRequest):
            executor.memory(rows)
    with pytest.raises(InvalidRequest, match="no memories"):
        opened(attention(16, cached=True), in_memory({}), {"tokens": 64}).memory(3)
    good = [np.zeros((3, heads * 16), np.float32) for heads in (KV_HEADS, HEADS)]
    for first, keys in ((8, good), (2**40, good), (0, good[:1]), (0, good[::-1]), (0, good * 2)):
        with pytest.raises(ValueError, match="keys and values"):
            memory.write(first, keys, keys)


def test_memories_are_freed_by_any_thread(rng: np.random.Generator) -> None:
    executor = opened(recalling(16), in_memory({}), {"tokens": 64}, blocks=BLOCKS)
    q, seen = rng.standard_normal((1, HEADS * 16), np.float32), np.array([[0], [30]], np.int32)

    def once(seed: int) -> bool:
        memory = executor.memory(30)
        fill([memory], np.random.default_rng(seed), 16, 30)
        return bool(
            executor.run({"q": q, "seen": seen}, sequences([(0, 1)], (memory,)))["out0"].any()
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(once, range(40)))
