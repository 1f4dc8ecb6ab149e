"""Attention by Triton's kernels, interpreted: against NumPy in float64, and in bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attending import Heads, Texts, causal, chunked, here

from spans import any_spans
from squall.gpu import attention, triton_attention
from squall.program import Attend

SHAPES = {
    "plain": Heads(),
    "one head": Heads(heads=1, kv_heads=1, dim=7),
    "grouped": Heads(heads=9, kv_heads=3, dim=64, block=32),
    "shared": Heads(kv_heads=1, block=32),
    "window": Heads(window=37, dim=17, kv_heads=4),
    "softcap": Heads(softcap=5.0, heads=6, dim=40),
    "wide": Heads(heads=2, kv_heads=2, dim=256, window=300, softcap=30.0),
}
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3}
nightly = pytest.mark.nightly("interpreters are slow")
CASES = [
    *((name, torch.float32, True) for name in ("one head", "window")),
    *(("softcap", torch.float16, exact) for exact in (True, False)),
    *(pytest.param(name, torch.float32, False, marks=nightly) for name in SHAPES),
    *(pytest.param(name, torch.float16, True, marks=nightly) for name in SHAPES),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts so short that few positions make several."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_attention, "PART", 64)


@pytest.mark.parametrize(("name", "dtype", "exact"), CASES)
def test_sequences_see_what_they_stored(
    name: str, dtype: torch.dtype, exact: bool, rng: np.random.Generator
) -> None:
    """A prompt at once, a prompt cut up, and an answer, side by side; over parts of a context."""
    texts = Texts(rng, SHAPES[name], (20, 140, 4))
    texts.spans[0][1, 3:18] = 18  # an image, whose rows see each other
    texts.spans[1][:, 100:] = np.minimum(any_spans(rng, 40, 140), causal(140)[1, 100:])
    steps = [[(1, 0, 100)], [(0, 0, 20), (2, 0, 3), (1, 100, 139)], [(1, 139, 140), (2, 3, 4)]]
    found = texts.ours(steps, dtype, exact=exact)
    for got, wanted in zip(found, texts.reference(steps), strict=True):
        np.testing.assert_allclose(got, wanted, atol=BOUNDS[dtype])


@pytest.mark.slow("interprets a prompt walked in three ways")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("shared", torch.float16),
        pytest.param("grouped", torch.float16, marks=nightly),
        pytest.param("plain", torch.float32, marks=nightly),
        pytest.param("window", torch.float32, marks=nightly),
    ],
)
def test_rows_have_the_same_bytes_whatever_they_are_computed_with(
    name: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """Few rows are walked in parts, many in one go."""
    length = 140
    texts = Texts(rng, SHAPES[name], (length, 60))
    whole = texts.ours([[(0, 0, length)]], dtype, exact=True)[0]
    alone = [[(0, 0, 126)], *([chunk] for chunk in chunked(126, 138, 6)), [(0, 138, 139)]]
    among = [[(1, 0, 50), (0, 0, 121)], [(1, 50, 53), (0, 121, 128)], [(0, 128, 139), (1, 53, 54)]]
    for steps, spare in ((alone, 0), (among, 2)):
        found = texts.ours([*steps, [(0, 139, 140)]], dtype, exact=True, spare=spare)[0]
        assert found.tobytes() == whole.tobytes()


@pytest.mark.parametrize("exact", [True, False])
def test_rows_of_a_run_see_any_spans(exact: bool, rng: np.random.Generator) -> None:
    """Queries of another space than the keys, few of them in parts; more heads than lanes."""
    heads = Heads(heads=19, kv_heads=1, dim=24, cached=False)
    (op,) = heads.program("patches").ops
    assert isinstance(op, Attend)
    for rows, keys in ((0, 5), (1, 1), (2, 200), (3, 0), (18, 40)):
        given, spans = heads.drawn(rng, rows, keys), any_spans(rng, rows, keys)
        q, k, v = (torch.from_numpy(x) for x in given)
        found = attention.attend_here(op, q, k, v, torch.from_numpy(spans), exact=exact)
        np.testing.assert_allclose(found.numpy(), here(heads, given, spans), atol=1e-5)


def test_columns_of_a_wider_matrix_are_read_in_place(rng: np.random.Generator) -> None:
    """As q, k and v of one product are."""
    heads = Heads(cached=False, window=9)
    (op,) = heads.program("patches").ops
    assert isinstance(op, Attend)
    given, spans = heads.drawn(rng, 20), causal(20)
    wide = torch.from_numpy(np.concatenate(given, axis=1))
    q, k, v = wide.split([x.shape[1] for x in given], dim=1)
    found = attention.attend_here(op, q, k, v, torch.from_numpy(spans), exact=True)
    np.testing.assert_allclose(found.numpy(), here(heads, given, spans), atol=1e-5)
