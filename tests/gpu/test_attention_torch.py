"""Attention in PyTorch, without Triton: against NumPy in float64, and against itself in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from attending import Heads, Texts, causal, chunked, here  # noqa: E402

from native_executor import in_memory  # noqa: E402
from reference_executor import ReferenceExecutor  # noqa: E402
from spans import any_spans  # noqa: E402
from squall.batch import Sequences  # noqa: E402
from squall.gpu import attention  # noqa: E402
from squall.program import Attend, Recall  # noqa: E402

SHAPES = {
    "plain": Heads(),
    "one head": Heads(heads=1, kv_heads=1, dim=7),
    "of one kv head": Heads(heads=5, kv_heads=1, dim=80),
    "grouped": Heads(heads=9, kv_heads=3, dim=64, block=32),
    "window": Heads(window=37, dim=17),
    "softcap": Heads(softcap=5.0, heads=3, kv_heads=3),
    "wide": Heads(heads=2, kv_heads=2, dim=256, window=130, softcap=30.0),
}
shapes = pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
exactness = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])


@pytest.fixture
def threads() -> Iterator[None]:
    """As many as there were, after a test that changes them."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@shapes
@exactness
def test_sequences_see_what_they_stored(
    heads: Heads, exact: bool, rng: np.random.Generator
) -> None:
    """A prompt at once, a prompt cut up, and answers, side by side."""
    texts = Texts(rng, heads, (300, 150, 20))
    texts.spans[0][1, 30:90] = 90  # an image, whose rows see each other
    texts.spans[1] = np.minimum(any_spans(rng, 150, 150), causal(150)[1])
    steps = [
        [(0, 0, 300), (1, 0, 70)],
        [(2, 0, 18), (1, 70, 148)],
        *([(1, at, at + 1), (2, at - 130, at - 129)] for at in range(148, 150)),
    ]
    for found, wanted in zip(texts.ours(steps, exact=exact), texts.reference(steps), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@shapes
@pytest.mark.usefixtures("threads")
def test_rows_have_the_same_bytes_whatever_they_are_computed_with(
    heads: Heads, rng: np.random.Generator
) -> None:
    length, early = 290, 250
    texts = Texts(rng, heads, (length, 140, 33))
    whole = texts.ours([[(0, 0, length)]], exact=True)[0]
    for count, size in ((3, length), (4, 100), (2, 7), (1, 5), (3, 1)):
        torch.set_num_threads(count)
        late = chunked(0 if size > 7 else early, length, size)
        chunks = late if size > 7 else [(0, 0, early), *late]
        alone = [[chunk] for chunk in chunks]
        among = [[(1, i, i + 1), chunk, (2, i, i + 1)] for i, chunk in enumerate(chunks[:33])]
        for steps, spare in ((alone, 0), (among, 6)):
            found = texts.ours(steps, exact=True, spare=spare)[0]
            done = slice(0, chunks[len(steps) - 1][2])
            assert found[done].tobytes() == whole[done].tobytes(), (count, size, spare)


@exactness
def test_rows_of_a_run_see_any_spans(exact: bool, rng: np.random.Generator) -> None:
    """Queries of another space than the keys, as a perceiver's latents are."""
    heads = Heads(heads=3, kv_heads=3, dim=72, cached=False)
    (op,) = heads.program("patches").ops
    assert isinstance(op, Attend)
    for rows, keys in ((0, 5), (1, 1), (2, 300), (3, 0), (5, 64), (23, 577), (300, 40)):
        given, spans = heads.drawn(rng, rows, keys), any_spans(rng, rows, keys)
        q, k, v = (torch.from_numpy(x) for x in given)
        found = attention.attend_here(op, q, k, v, torch.from_numpy(spans), exact=exact)
        np.testing.assert_allclose(found.numpy(), here(heads, given, spans), atol=1e-5)


def test_rows_of_a_run_may_see_a_window(rng: np.random.Generator) -> None:
    heads = Heads(dim=40, cached=False, window=9)
    (op,) = heads.program("patches").ops
    assert isinstance(op, Attend)
    given = heads.drawn(rng, 70)
    q, k, v = (torch.from_numpy(x) for x in given)
    found = attention.attend_here(op, q, k, v, torch.from_numpy(causal(70)), exact=True)
    np.testing.assert_allclose(found.numpy(), here(heads, given, causal(70)), atol=1e-5)


@exactness
def test_memories_are_recalled(exact: bool, rng: np.random.Generator) -> None:
    """A sequence with one, one with none, one without rows, one with another."""
    heads = Heads(dim=24)
    program, bounds = heads.recalling(), np.array([0, 3, 9, 9, 14], np.int32)
    (op,) = program.ops
    assert isinstance(op, Recall)
    executor = ReferenceExecutor(program, in_memory({}), blocks=1)
    memories, held = [], []
    for rows in (50, None, 30, 200):
        memory, pair = None, None
        if rows is not None:
            _, k, v = heads.drawn(rng, 1, rows)
            memory = executor.memory(rows)
            memory.write(0, [k], [v])
            pair = tuple(torch.from_numpy(x) for x in (k, v))
        memories.append(memory)
        held.append(pair)
    sequences = Sequences(
        positions=np.concatenate([np.arange(n) for n in np.diff(bounds)]).astype(np.int32),
        bounds=bounds,
        block_tables=np.zeros((4, 1), np.int32),
        memories=tuple(memories),
    )
    q, _, _ = heads.drawn(rng, 14)
    seen = any_spans(rng, 14, 50)
    wanted = executor.run({"q": q, "seen": seen}, sequences)["out"]
    arrays, shape = attention.layout(sequences, 16)
    rows_ = attention.Rows({n: torch.from_numpy(a) for n, a in arrays.items()}, shape, 16)
    found = attention.recall(
        op, torch.from_numpy(q), held, torch.from_numpy(seen), rows_, exact=exact
    )
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_answers_of_as_many_sequences_have_one_shape(rng: np.random.Generator) -> None:
    """So that one CUDA graph serves 5 answers as well as 8, and contexts of other lengths."""
    texts = Texts(rng, Heads(), [130, 160, 90, 140, 170, 150, 180, 130])
    eight = [(s, length - 1, length) for s, length in enumerate(texts.lengths)]
    five = [(s, first - 3, last - 3) for s, first, last in eight[:5]]
    shapes = [attention.layout(texts.step(c)[2], 16, rows=8)[1] for c in (eight, five)]
    assert shapes[0] == shapes[1]
    assert (shapes[0].rows, shapes[0].longest, shapes[0].most) == (8, 256, 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_long_prompts_take_no_gigabytes(rng: np.random.Generator) -> None:
    """512 rows of 32 heads that see 8,192 positions would have half a gigabyte of scores."""
    heads = Heads(heads=32, kv_heads=8, dim=16, cached=False)
    (op,) = heads.program("patches").ops
    assert isinstance(op, Attend)
    q, k, v = (torch.from_numpy(x) for x in heads.drawn(rng, 512, 8192))
    spans = torch.from_numpy(causal(512) + np.array([[0], [7680]], np.int32))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    attention.attend_here(op, q, k, v, spans, exact=True)
    assert _resident("VmHWM") - before < 150e6


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if name in line) * 1024
