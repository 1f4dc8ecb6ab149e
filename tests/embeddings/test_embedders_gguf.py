"""GGUF files of models that embed, against transformers and the same models as folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from convert import convert
from gguf_embedders import write_bert
from harness import distance
from tiny_embedders import DECODER, MODELS, TEXTS, ids, random, rows, vector, word_pieces, write
from tokenizers import normalizers

from squall import Embedder, Model
from squall.embeddings.files import is_embedding_model
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.text.bytelevel import BYTE_OF

CLOSE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
BYTES = [*sorted(BYTE_OF), "<eos>", "ab"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": BYTES,
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 256,
    "tokenizer.ggml.token_type": [1] * 256 + [3, 1],
}  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize(
    "kind", ["BertModel", "RobertaModel", "DistilBertModel", "NomicBertModel", "ModernBertModel"]
)
def test_berts(tmp_path: Path, kind: str, pooling: str) -> None:
    path = tmp_path / "bert.gguf"
    model = write(tmp_path, kind)
    write_bert(model, path, pooling)
    assert is_embedding_model(path)
    with Embedder.open(path) as found, Embedder.open(tmp_path, pooling=pooling) as folder:
        texts = [ids(length) for length in (1, 20, 128)]
        for text, one in zip(texts, found.embed(texts, normalize=False).vectors, strict=True):
            assert distance(one, vector(rows(model, text), pooling)) < CLOSE
        assert np.array_equal(found.embed(texts).vectors, folder.embed(texts).vectors)
        assert found.context == folder.context


def test_word_pieces(tmp_path: Path) -> None:
    path = tmp_path / "bert.gguf"
    write_bert(random("BertModel", transformers.BertConfig(**MODELS["BertModel"][1])), path, "mean")
    library = word_pieces()
    library.normalizer = normalizers.BertNormalizer(lowercase=True)  # which takes accents off
    library.encode_special_tokens = True
    with Embedder.open(path) as found:
        for text in (*TEXTS, "The QUICK\tbrown\u3000fox.Jumps!", "\x00\ufffd\u200bthinging"):
            assert found.count(text) == len(library.encode(text).ids), text
            wanted = found.embed([library.encode(text).ids]).vectors
            assert np.array_equal(found.embed([text]).vectors, wanted), text


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_matrices_in_other_formats(tmp_path: Path, kind: str) -> None:
    values = MODELS["BertModel"][1] | {"hidden_size": 64, "intermediate_size": 96}
    model = random("BertModel", transformers.BertConfig(**values))
    write_bert(model, tmp_path / "bert.gguf", "mean", kind)
    with Embedder.open(tmp_path / "bert.gguf") as found:
        text = ids(60)
        near = found.embed([text], normalize=False).vectors[0]
    assert 1e-6 < distance(near, rows(model, text).mean(0)) < {"F16": 3e-3, "Q8_0": 5e-2}[kind]


def decoder(
    model: Any, path: Path, architecture: str, more: Any = (), **extra: Any
) -> None:  # fmt: skip
    """A model of transformers without its head. more: tensors."""
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    weights |= dict(more)
    text = SimpleNamespace(config=model.config, state_dict=lambda: weights)
    convert(text, architecture, path, extra=TOKENIZER | extra)  # type: ignore[arg-type]


def test_qwen3_embedding(tmp_path: Path) -> None:
    path = tmp_path / "qwen3.gguf"
    model = random("Qwen3Model", transformers.Qwen3Config(**DECODER | {"vocab_size": 258}))
    ends = {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": False}
    decoder(model, path, "qwen3", pooling_type=int(gguf.PoolingType.LAST), **ends)
    assert is_embedding_model(path)
    with Embedder.open(path) as found:
        text = [*(BYTES.index(letter) for letter in "xyz"), 257, 256]
        one = found.embed(["xyzab"], normalize=False)
        assert distance(one.vectors[0], rows(model, text)[-1]) < CLOSE
        assert one.tokens == found.count("xyzab") == 5
        assert found.count("<eos>") == 5 + 1  # its name is text
    with pytest.raises(UnsupportedModel, match=r"squall\.Embedder"):
        Model.open(path)


@pytest.mark.parametrize("linears", [False, True])
def test_embedding_gemma(tmp_path: Path, linears: bool) -> None:
    path = tmp_path / "gemma.gguf"
    changes = {"vocab_size": 258, "num_hidden_layers": 7, "layer_types": None}
    values = MODELS["Gemma3TextModel"][1] | changes | {"query_pre_attn_scalar": 16}
    model = random("Gemma3TextModel", transformers.Gemma3TextConfig(**values))
    saved = {"attention.sliding_window": 14, "pooling_type": int(gguf.PoolingType.MEAN)}
    shapes = {"dense_2.weight": (72, 48), "dense_3.weight": (48, 72)} if linears else {}
    more = {name: torch.randn(shape) / 8 for name, shape in shapes.items()}
    decoder(model, path, "gemma-embedding", more, **saved)
    text = ids(50)
    wanted = rows(model, text).mean(0)
    for weight in more.values():
        wanted = weight.numpy() @ wanted
    with Embedder.open(path) as found:
        assert distance(found.embed([text], normalize=False).vectors[0], wanted) < CLOSE


@pytest.mark.parametrize(("pooling", "error", "message"), [
    (4, UnsupportedModel, "the classifier has 0 labels; those of .* have 2"),
    (9, InvalidCheckpoint, r"pooling_type is 9; it must be in 0\.\.4"),
])  # fmt: skip
def test_other_poolings(tmp_path: Path, pooling: int, error: type[Exception], message: str) -> None:
    path = tmp_path / "qwen3.gguf"
    model = random("Qwen3Model", transformers.Qwen3Config(**DECODER | {"vocab_size": 258}))
    decoder(model, path, "qwen3", pooling_type=pooling)
    with pytest.raises(error, match=message):
        Embedder.open(path)


def test_a_language_model(tmp_path: Path) -> None:
    """Of any, rows can be pooled."""
    path = tmp_path / "llama.gguf"
    model = random("LlamaModel", transformers.LlamaConfig(**DECODER | {"vocab_size": 258}))
    decoder(model, path, "llama")
    assert not is_embedding_model(path)
    text = ids(30)
    for pooling in ("cls", "mean", "last"):
        with Embedder.open(path, pooling=pooling) as found, torch.no_grad():
            near = found.embed([text], normalize=False).vectors[0]
            assert distance(near, vector(rows(model, text), pooling)) < CLOSE
