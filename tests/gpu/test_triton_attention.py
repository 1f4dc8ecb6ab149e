"""Attention by Triton's kernels, interpreted: against NumPy in float64, and in bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attending import Heads, Texts, any_spans, causal, chunked, here

from squall.gpu import attention, triton_attention
from squall.program import Attend

SHAPES = {
    "plain": Heads(),
    "one head": Heads(heads=1, kv_heads=1, dim=7),
    "grouped": Heads(heads=9, kv_heads=3, dim=64, block=32),
    "of one kv head": Heads(heads=19, kv_heads=1, dim=16),
    "window": Heads(window=37, dim=17, kv_heads=4),
    "softcap": Heads(softcap=5.0, heads=6, dim=40),
    "wide": Heads(heads=2, kv_heads=2, dim=256, window=300, softcap=30.0),
}
shapes = pytest.mark.parametrize("heads", SHAPES.values(), ids=SHAPES)
exactness = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3}
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["f32", "f16"])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts so short that few positions make several."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_attention, "PART", 64)


@shapes
@dtypes
@exactness
def test_sequences_see_what_they_stored(
    heads: Heads, dtype: torch.dtype, exact: bool, rng: np.random.Generator
) -> None:
    """A prompt at once, a prompt cut up, and answers, side by side; over parts of a context."""
    texts = Texts(rng, heads, (40, 150, 12))
    texts.spans[0][1, 10:30] = 30  # an image, whose rows see each other
    texts.spans[1][:, 80:] = np.minimum(any_spans(rng, 70, 150), causal(150)[1, 80:])
    steps = [
        [(0, 0, 40), (1, 0, 141)],
        [(2, 0, 10), (1, 141, 148)],
        *([(1, at, at + 1), (2, at - 138, at - 137)] for at in range(148, 150)),
    ]
    found = texts.ours(steps, dtype, exact=exact)
    for got, wanted in zip(found, texts.reference(steps), strict=True):
        np.testing.assert_allclose(got, wanted, atol=BOUNDS[dtype])
