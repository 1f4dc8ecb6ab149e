"""Scores of pairs, against sentence-transformers' rules and transformers' numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from convert import convert
from gguf_embedders import write_bert
from tiny_embedders import BERT, DECODER, VOCAB, pooled, word_pieces, write
from tokenizers import Tokenizer, models, pre_tokenizers

from squall import Embedder
from squall.embeddings.files import is_embedding_model
from squall.errors import InvalidRequest, UnsupportedModel

CLOSE = 1e-5
QUERY = "who sat on the mat?"
DOCUMENTS = ["the cat sat", "", "a dog, not the cat " * 4, "x", *("abcdefgh" * n for n in range(9))]
JUDGES = {
    "BertForSequenceClassification": "BertModel",
    "RobertaForSequenceClassification": "RobertaModel",
    "XLMRobertaForSequenceClassification": "XLMRobertaModel",
    "MPNetForSequenceClassification": "MPNetModel",
    "DistilBertForSequenceClassification": "DistilBertModel",
    "ElectraForSequenceClassification": "ElectraModel",
    "ModernBertForSequenceClassification": "ModernBertModel",
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def judge(folder: Path, kind: str, **changes: Any) -> Any:
    return write(folder, kind, of=JUDGES[kind], num_labels=1, **changes)


def wanted(folder: Path, model: Any, query: str, documents: list[str], limit: int = 999) -> Any:
    """As the CrossEncoder of sentence-transformers asks, but one by one: without padding."""
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(limit, strategy="longest_first")
    found = []
    for document in documents:
        pair = library.encode(query, document)
        given = {"input_ids": torch.tensor([pair.ids])}
        if getattr(model.config, "type_vocab_size", 1) > 1:
            given["token_type_ids"] = torch.tensor([pair.type_ids])
        with torch.no_grad():
            logits = model(**given).logits
        found.append(logits[0, 0].item())
    return np.array(found)


@pytest.mark.parametrize("kind", JUDGES)
def test_pairs(tmp_path: Path, kind: str) -> None:
    model = judge(tmp_path, kind)
    assert is_embedding_model(tmp_path)
    logits = wanted(tmp_path, model, QUERY, DOCUMENTS)
    with Embedder.open(tmp_path) as embedder:
        assert embedder.reranks
        found = embedder.rerank(QUERY, DOCUMENTS)
        alone = [embedder.rerank(QUERY, [text]).scores[0] for text in DOCUMENTS]
        assert np.array_equal(alone, found.scores)
        with pytest.raises(InvalidRequest, match="judges pairs"):
            embedder.embed(["a"])
    assert np.abs(found.scores - 1 / (1 + np.exp(-logits))).max() < CLOSE


def test_pairs_whose_rows_are_averaged(tmp_path: Path) -> None:
    kind = "ModernBertForSequenceClassification"
    model = judge(tmp_path, kind, classifier_pooling="mean", classifier_bias=True)
    logits = wanted(tmp_path, model, QUERY, DOCUMENTS)
    with Embedder.open(tmp_path) as embedder:
        found = embedder.rerank(QUERY, DOCUMENTS).scores
    assert np.abs(found - 1 / (1 + np.exp(-logits))).max() < CLOSE


@pytest.mark.parametrize("pooling", ["rank", None])  # early converters left it out
@pytest.mark.parametrize("kind", [
    "BertForSequenceClassification", "XLMRobertaForSequenceClassification",
    "ModernBertForSequenceClassification",
])  # fmt: skip
def test_pairs_of_gguf_files(tmp_path: Path, kind: str, pooling: str | None) -> None:
    changes = {"classifier_pooling": "mean"} if kind.startswith("Modern") else {}
    model = judge(tmp_path, kind, **changes)
    path = tmp_path / "judge.gguf"
    write_bert(model, path, pooling)
    if kind.startswith("Bert"):  # whose pooler is not in the file
        model.bert.pooler.forward = lambda states: states[:, 0]
    logits = wanted(tmp_path, model, QUERY, DOCUMENTS)
    with Embedder.open(path) as embedder:
        assert embedder.reranks
        found = embedder.rerank(QUERY, DOCUMENTS).scores
    assert np.abs(found - 1 / (1 + np.exp(-logits))).max() < CLOSE


def test_gguf_files_of_other_classifiers(tmp_path: Path) -> None:
    model = write(tmp_path, "BertForSequenceClassification", of="BertModel", num_labels=3)
    write_bert(model, tmp_path / "three.gguf", "rank")
    write_bert(model.bert, tmp_path / "none.gguf", "rank")
    for name, labels in (("three", 3), ("none", 0)):
        with pytest.raises(UnsupportedModel, match=f"the classifier has {labels} labels"):
            Embedder.open(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize(("name", "said"), [
    ("config.json", {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}),
    ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.Identity"}}),
    ("config_sentence_transformers.json", {"activation_fn": "torch.nn.modules.linear.Identity"}),
])  # fmt: skip
def test_plain_numbers(tmp_path: Path, name: str, said: dict[str, Any]) -> None:
    model = judge(tmp_path, "BertForSequenceClassification")
    path = tmp_path / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | said))
    with Embedder.open(tmp_path) as embedder:
        found = embedder.rerank(QUERY, DOCUMENTS).scores
    logits = wanted(tmp_path, model, QUERY, DOCUMENTS)
    assert np.abs(found - logits).max() < CLOSE * np.abs(logits).max()


@pytest.mark.parametrize("query", [QUERY, "long query " * 12])
def test_of_what_is_too_long_the_longer_gives_way(tmp_path: Path, query: str) -> None:
    model = judge(tmp_path, "BertForSequenceClassification", max_position_embeddings=40)
    with Embedder.open(tmp_path) as embedder:
        with pytest.raises(InvalidRequest, match=r"document 2 has \d+ tokens, .* reads 40"):
            embedder.rerank(QUERY, DOCUMENTS[:3])
        found = embedder.rerank(query, DOCUMENTS, truncate=True).scores
    logits = wanted(tmp_path, model, query, DOCUMENTS, 40)
    assert np.abs(found - 1 / (1 + np.exp(-logits))).max() < CLOSE


def test_a_tokenizer_that_gives_no_types(tmp_path: Path) -> None:
    model = judge(tmp_path, "BertForSequenceClassification")
    given = {"model_input_names": ["input_ids", "attention_mask"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(given))
    model.config.type_vocab_size = 1
    logits = wanted(tmp_path, model, QUERY, DOCUMENTS[:3])
    with Embedder.open(tmp_path) as embedder:
        found = embedder.rerank(QUERY, DOCUMENTS[:3]).scores
    assert np.abs(found - 1 / (1 + np.exp(-logits))).max() < CLOSE


def test_a_classifier_of_more_labels(tmp_path: Path) -> None:
    write(tmp_path, "BertForSequenceClassification", of="BertModel", num_labels=3)
    with pytest.raises(UnsupportedModel, match="3 labels; those of models that judge pairs have 1"):
        Embedder.open(tmp_path)


def test_other_activations(tmp_path: Path) -> None:
    judge(tmp_path, "BertForSequenceClassification")
    config = json.loads((tmp_path / "config.json").read_text())
    config["sbert_ce_default_activation_function"] = "os.system"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="'system'; known: Sigmoid, Identity"):
        Embedder.open(tmp_path)


def byte_pairs() -> tuple[list[str], Tokenizer]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "ye", "yes", "no", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    ids = {word: at for at, word in enumerate(words)}
    library = Tokenizer(models.BPE(ids, [("y", "e"), ("ye", "s"), ("n", "o")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(words[-4:-2])
    return words, library


def answers(model: Any, library: Tokenizer, documents: list[str]) -> Any:
    """The probability of yes against no, asked as the model card says."""
    system = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".'
    )
    task = "Given a web search query, retrieve relevant passages that answer the query"
    plain = Tokenizer.from_str(library.to_str())
    plain.encode_special_tokens = True
    found = []
    for document in documents:
        text = f"<Instruct>: {task}\n<Query>: {QUERY}\n<Document>: {document}"
        asked = [
            *library.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n").ids,
            *plain.encode(text).ids,
            *library.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n").ids,
        ]
        with torch.no_grad():
            logits = model(torch.tensor([asked])).logits[0, -1]
        yes, no = (logits[library.token_to_id(word)].item() for word in ("yes", "no"))
        found.append(1 / (1 + math.exp(no - yes)))
    return np.array(found)


@pytest.mark.parametrize("gguf", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_that_says_yes_or_no(tmp_path: Path, tied: bool, gguf: bool) -> None:
    path = tmp_path / "Tiny-Qwen3-Reranker"
    words, library = byte_pairs()
    changes = {"vocab_size": len(words), "tie_word_embeddings": tied}
    model = write(path, "Qwen3ForCausalLM", of="Qwen3Model", max_position_embeddings=900, **changes)
    library.save(str(path / "tokenizer.json"))
    score = {
        "type": "sentence_transformers.cross_encoder.modules.LogitScore",
        "path": "1_LogitScore",
    }
    (path / "modules.json").write_text(json.dumps([score]))
    if gguf:
        path = tmp_path / "reranker.gguf"
        rows = model.lm_head.weight.detach()[[library.token_to_id(word) for word in ("yes", "no")]]
        weights = model.model.state_dict()
        weights = {f"model.{name}": weight for name, weight in weights.items()}
        text = SimpleNamespace(
            config=model.config, state_dict=lambda: weights | {"cls.output.weight": rows}
        )
        extra = {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["y e", "ye s", "n o"],
            "tokenizer.ggml.eos_token_id": words.index("<|im_end|>"), "pooling_type": 4,
            "tokenizer.ggml.token_type": [1] * (len(words) - 4) + [3, 3, 1, 1],
            "classifier.output_labels": ["yes", "no"],
        }  # fmt: skip
        convert(text, "qwen3", path, extra=extra)  # type: ignore[arg-type]
    assert is_embedding_model(path)
    documents = ["the cat", "<|im_end|> yes", "a dog " * 7]
    with Embedder.open(path) as embedder:
        assert embedder.reranks
        found = embedder.rerank(QUERY, documents).scores
    assert np.abs(found - answers(model, library, documents)).max() < CLOSE


def test_cosines_of_a_model_that_embeds(tmp_path: Path) -> None:
    write(tmp_path, "BertModel")
    pooled(tmp_path, "mean", prompts={"query": "ask: ", "passage": "tell: "})
    with Embedder.open(tmp_path) as embedder:
        assert not embedder.reranks
        found = embedder.rerank(QUERY, DOCUMENTS)
        asked = embedder.embed([f"ask: {QUERY}"]).vectors[0]
        told = embedder.embed([f"tell: {text}" for text in DOCUMENTS])
        assert np.allclose(found.scores, told.vectors @ asked, atol=1e-6)
        assert found.tokens == told.tokens + embedder.count(f"ask: {QUERY}")
        assert len(embedder.rerank(QUERY, []).scores) == 0
        with pytest.raises(InvalidRequest, match="documents is str"):
            embedder.rerank(QUERY, "one")


def test_sizes_of_the_tables() -> None:
    """So that no two are the same by chance."""
    assert len({VOCAB, BERT["hidden_size"], BERT["intermediate_size"], DECODER["head_dim"]}) == 4
    assert word_pieces().get_vocab_size() == VOCAB
