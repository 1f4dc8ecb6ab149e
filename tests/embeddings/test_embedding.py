"""Vectors of tiny models against transformers, the same bytes in any batch, no field unnoticed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import distance
from mutate import mutations
from numpy.typing import NDArray
from tiny_embedders import MODELS, POOLED, TEXTS, VOCAB, ids, pooled, rows, vector, write

from squall import Embedder, Model, executors
from squall.checkpoints import open_checkpoint
from squall.embeddings.reading import ROWS, Place, Reader
from squall.embeddings.tokens import Text
from squall.errors import EngineStopped, InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.executors import Placement
from squall.recipes import embedders
from squall.recipes.embedders import Recipe
from squall.recipes.names import Part, place
from squall.roles import roles
from squall.weights import WeightStore

CLOSE, MOVED = 1e-5, 2e-5
LENGTHS = (1, 2, 3, 16, 17, 33, 64, 65, 128)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("kind", MODELS)
def test_vectors_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = write(tmp_path, kind)
    texts = [ids(length) for length in LENGTHS]
    states = [rows(model, text) for text in texts]
    for pooling in POOLED:
        pooled(tmp_path, pooling)
        with Embedder.open(tmp_path, threads=2) as embedder:
            assert embedder.width == 48
            made = embedder.embed(texts, normalize=False)
            unit = embedder.embed(texts)
        assert made.tokens == sum(LENGTHS)
        for state, found, one in zip(states, made.vectors, unit.vectors, strict=True):
            wanted = vector(state, pooling)
            assert distance(found, wanted) < CLOSE, (pooling, len(state))
            assert distance(one, wanted / np.linalg.norm(wanted)) < CLOSE


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("isq", [None, "Q8_0", "Q4K"])
def test_a_text_has_one_vector(tmp_path: Path, kind: str, isq: str | None) -> None:
    """Alone, in any batch, in any order, on any number of threads."""
    write(tmp_path, kind)
    texts = [*TEXTS, *(ids(length) for length in LENGTHS)] * 2
    texts += [ids(128, seed) for seed in range(9)]  # more than one run
    order = np.random.default_rng(1).permutation(len(texts))
    texts = [text for text in texts if text != ""] if kind == "Model" else texts
    with Embedder.open(tmp_path, isq=isq, threads=1) as embedder:
        wanted = embedder.embed(texts).vectors
    assert np.isfinite(wanted).all()
    with Embedder.open(tmp_path, isq=isq, threads=3) as embedder:
        shuffled = embedder.embed([texts[i] for i in order]).vectors
        alone = [embedder.embed([text]).vectors[0] for text in texts[::3]]
    assert np.array_equal(shuffled, wanted[order])
    assert np.array_equal(alone, wanted[::3])


def test_texts_longer_than_a_run(tmp_path: Path) -> None:
    model = write(tmp_path, "Qwen3Model", max_position_embeddings=4 * ROWS)
    long, short = ids(ROWS + 77), ids(5)
    with Embedder.open(tmp_path) as embedder:
        before = embedder.embed([short]).vectors
        found = embedder.embed([short, long, short], normalize=False).vectors
        assert distance(found[1], rows(model, long)[-1]) < CLOSE
        assert np.array_equal(found[0], found[2])
        assert np.array_equal(embedder.embed([short]).vectors, before)
        assert embedder.context == 4 * ROWS


def test_positions_and_types_of_decoders_have_no_say(tmp_path: Path) -> None:
    """A pooling that the files do not name is the mean of an encoder's, the last of a decoder's."""
    text = ids(20)
    for kind, pooling in (("BertModel", "mean"), ("Qwen3Model", "last"), ("LlamaModel", "last")):
        folder = tmp_path / kind
        model = write(folder, kind)
        with Embedder.open(folder) as embedder:
            found = embedder.embed([text], normalize=False).vectors[0]
        assert distance(found, vector(rows(model, text), pooling)) < CLOSE
        with Embedder.open(folder, pooling="cls") as embedder:
            found = embedder.embed([text], normalize=False).vectors[0]
        assert distance(found, rows(model, text)[0]) < CLOSE


def test_on_pytorch(tmp_path: Path) -> None:
    for kind in ("BertModel", "Gemma3TextModel"):
        folder = tmp_path / kind
        write(folder, kind)
        with Embedder.open(folder) as embedder:
            wanted = embedder.embed(TEXTS).vectors
        with Embedder.open(folder, device="torch") as embedder:
            assert distance(embedder.embed(TEXTS).vectors, wanted) < 1e-4


# ---- mutations ----


@pytest.mark.parametrize(
    "kind",
    [
        "BertModel",
        "XLMRobertaModel",
        "MPNetModel",
        "ModernBertModel",
        "NomicBertModel",
        "Gemma3TextModel",
    ],
)
def test_no_field_goes_unnoticed(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    recipe = embedders.load(open_checkpoint(tmp_path))
    wanted, unmoved = states(recipe), []
    for name, changed in mutations(recipe.spec, 1):
        if not _is_equivalent(name, kind) and (moved := _effect(recipe, changed, wanted)) <= MOVED:
            unmoved.append(f"{name}: {moved:.1e}")
    assert not unmoved


def states(recipe: Recipe) -> NDArray[np.float32]:
    at = Place(Placement(), executors.thread_pool(2))
    reader = Reader(recipe, WeightStore(recipe.checkpoint), at, "mean", 128)
    return np.array(list(reader.rows([Text(np.array(ids(64), np.int32), 40)])))


def _is_equivalent(name: str, kind: str) -> bool:
    """What only logits have; norms without one to scope; a window of all, in both directions.

    And the first of positions that are not learned.
    """
    of_logits = ("vocab", "tied", "head_bias", "logit_", "sees", "more_ids", "context")
    decoder = kind == "Gemma3TextModel"
    scope = "qk_norm_scope" in name and (not decoder or name.endswith("=each_head"))
    turns = kind in ("ModernBertModel", "NomicBertModel") and name.startswith("first")
    return scope or turns or (decoder and name.startswith(of_logits))


def _effect(recipe: Recipe, changed: Any, wanted: NDArray[np.float32]) -> float:
    part = Part(recipe.text.kind, changed, recipe.text.naming)
    if not {part.naming.split(role)[1] for role in roles(changed)} <= part.naming.stems.keys():
        return math.inf
    try:
        (placed,) = place([part], recipe.checkpoint.tensors, read=set(recipe.checkpoint.tensors))
        found = states(replace(recipe, text=placed))
    except (InvalidCheckpoint, InvalidRequest, UnsupportedModel, ValueError):
        return math.inf
    return math.inf if found.shape != wanted.shape else distance(found, wanted)


# ---- what can be asked ----


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bert")
    write(folder, "BertModel")
    pooled(folder, "mean", prompts={"query": "ask: ", "plain": ""}, default_prompt_name="plain")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    with Embedder.open(folder) as opened:
        yield opened


def test_prompts(embedder: Embedder) -> None:
    wanted = embedder.embed(["ask: the cat"]).vectors
    assert np.array_equal(embedder.embed(["the cat"], prompt="query").vectors, wanted)
    assert np.array_equal(embedder.embed(["the cat"], prompt="ask: ").vectors, wanted)
    assert not np.array_equal(embedder.embed(["the cat"]).vectors, wanted)


def test_fewer_dimensions(embedder: Embedder) -> None:
    whole = embedder.embed(TEXTS[:3], normalize=False).vectors
    cut = embedder.embed(TEXTS[:3], normalize=False, dimensions=7).vectors
    assert np.array_equal(cut, whole[:, :7])
    unit = embedder.embed(TEXTS[:3], dimensions=7).vectors
    assert np.allclose(unit, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    for wrong in (0, 49, -1):
        with pytest.raises(InvalidRequest, match=r"dimensions is .*1\.\.48"):
            embedder.embed(["a"], dimensions=wrong)


def test_texts_that_are_too_long(embedder: Embedder) -> None:
    assert embedder.context == 40
    with pytest.raises(InvalidRequest, match="text 1 has 43 tokens, and this model reads 40"):
        embedder.embed(["a", "b " * 41])
    found = embedder.embed(["a", "b " * 41], truncate=True)
    assert found.tokens == 3 + 40
    assert np.array_equal(found.vectors[1], embedder.embed(["b " * 38]).vectors[0])
    assert embedder.count("b " * 41) == 43
    assert embedder.embed([[7] * 50], truncate=True).tokens == 40


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a text", "texts is str; it must be a list"),
        ([3], "text 0 is 3; it must be a string"),
        (["a", None], "text 1 is None"),
        ([[]], "text 0 is empty"),
        ([[VOCAB]], rf"token {VOCAB}; ids are whole numbers in 0\.\.{VOCAB - 1}"),
        ([[1.5]], r"token 1\.5"),
        ([[True]], "token True"),
        (["a\ud800"], "surrogate"),
        (["a"] * 65537, "65537 texts; at most 65536"),
    ],
)
def test_what_cannot_be_embedded(embedder: Embedder, texts: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        embedder.embed(texts)


def test_nothing_is_nothing(embedder: Embedder) -> None:
    found = embedder.embed([])
    assert (found.vectors.shape, found.tokens) == ((0, 48), 0)


def test_names_of_special_tokens_are_text(embedder: Embedder) -> None:
    assert embedder.count("[SEP]") == 2 + 5


def test_a_closed_model(tmp_path: Path) -> None:
    write(tmp_path, "BertModel")
    embedder = Embedder.open(tmp_path)
    embedder.close()
    embedder.close()
    with pytest.raises(EngineStopped, match="closed"):
        embedder.embed(["a"])


def test_options_that_it_has_not(tmp_path: Path) -> None:
    write(tmp_path, "BertModel")
    with pytest.raises(InvalidRequest, match="kv_tokens is not for models that embed"):
        Embedder.open(tmp_path, kv_tokens=64)
    with pytest.raises(InvalidRequest, match="context is 131; this model reads 1 to 130"):
        Embedder.open(tmp_path, context=131)
    with pytest.raises(InvalidRequest, match="pooling is 'min'; it must be one of cls, mean, "):
        Embedder.open(tmp_path, pooling="min")
    with pytest.raises(InvalidRequest, match="name a model that embeds"):
        Embedder.open()


@pytest.mark.parametrize("kind", ["BertModel", "Qwen3Model"])
def test_they_write_no_text(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    with pytest.raises(UnsupportedModel, match=r"squall\.Embedder"):
        Model.open(tmp_path)
