"""Ollama's API, asked for with its official client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest
from embedders import MadeUpEmbedder
from made_up import ANSWERS, MadeUp, streamed
from pydantic import BaseModel
from servers import (
    Process,
    connect,
    in_thread,
    leave_in_the_middle,
    post_bytes,
    read_until,
    serving,
)

from squall import ChatCompletionRequest, EngineConfig, Model
from squall.api.messages import images_of
from squall.opening import Opening
from squall.server.ollama import GenerateBody, OllamaChatBody, OllamaDialect
from squall.server.residence import Lazy

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "num_predict": 24, "num_ctx": 512}


@pytest.fixture
def llama(server: Process) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url) as found:
        yield found


def said(client: openai.OpenAI, messages: Any = QUESTION, **fields: Any) -> str:
    found = client.chat.completions.create(
        model="small", temperature=0, max_tokens=24, messages=messages, **fields
    )
    return found.choices[0].message.content or ""


@pytest.mark.parametrize("name", ["small", "small:latest"])
def test_a_chat_is_what_a_chat_says(llama: ollama.Client, client: openai.OpenAI, name: str) -> None:
    found = llama.chat(name, QUESTION, options=GREEDY)
    assert found.message.content == said(client)
    assert (found.message.role, found.model) == ("assistant", "small")
    assert (found.done, found.done_reason) == (True, "stop")
    assert found.created_at is not None
    assert datetime.fromisoformat(found.created_at.replace("Z", "+00:00")).tzinfo is not None
    assert found.prompt_eval_count == 37 or found.prompt_eval_count
    assert found.eval_count
    assert found.total_duration is not None
    assert found.load_duration is not None
    parts = (found.prompt_eval_duration or 0) + (found.eval_duration or 0) + found.load_duration
    assert 0 < parts <= found.total_duration < 60e9


def test_a_stream_is_the_whole(llama: ollama.Client) -> None:
    whole = llama.chat("small", QUESTION, options=GREEDY)
    *parts, last = llama.chat("small", QUESTION, options=GREEDY, stream=True)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert not any(part.done for part in parts)
    assert (last.done, last.done_reason, last.message.content) == (True, "stop", "")
    assert last.eval_count == whole.eval_count
    assert len(parts) > 5


def test_lines_of_json_are_the_default(http: httpx.Client) -> None:
    body = {"model": "small", "messages": QUESTION, "options": GREEDY}
    found = http.post("/api/chat", json=body)
    assert found.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["done"] for line in found.text.splitlines()][-2:] == [False, True]
    whole = http.post("/api/chat", json=body | {"stream": False})
    assert whole.headers["content-type"] == "application/json"
    assert whole.json()["done"] is True


def test_generate(llama: ollama.Client, client: openai.OpenAI) -> None:
    text = QUESTION[0]["content"]
    found = llama.generate("small", text, options=GREEDY)
    assert found.response == said(client)
    system = {"role": "system", "content": "Answer in German."}
    with_system = llama.generate("small", text, system=system["content"], options=GREEDY)
    assert with_system.response == said(client, [system, *QUESTION])
    *parts, last = llama.generate("small", text, options=GREEDY, stream=True)
    assert "".join(part.response or "" for part in parts) == found.response
    assert (last.response, last.done_reason) == ("", "stop")


def test_a_raw_prompt_has_control_tokens(llama: ollama.Client, client: openai.OpenAI) -> None:
    rendered = httpx.post(
        f"{str(client.base_url)[:-4]}/render", json={"messages": QUESTION}, timeout=60
    ).json()
    found = llama.generate("small", rendered["prompt"], raw=True, options=GREEDY)
    assert found.response == said(client)
    assert found.prompt_eval_count == rendered["count"]
    plain = llama.generate("small", "The capital of France is", raw=True, options=GREEDY)
    wanted = client.completions.create(
        model="small", prompt="The capital of France is", temperature=0, max_tokens=24
    )
    assert plain.response == wanted.choices[0].text


def test_options(llama: ollama.Client, client: openai.OpenAI) -> None:
    more = {"frequency_penalty": 0.5, "presence_penalty": 0.1, "seed": 7, "top_p": 0.9}
    wanted = client.chat.completions.create(
        model="small", messages=QUESTION, temperature=1.2, max_tokens=24, stop=["."],
        extra_body={"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1}, **more,
    )  # fmt: skip
    options = {
        **more, "temperature": 1.2, "num_predict": 24.0, "stop": ["."], "top_k": 30, "min_p": 0.01,
        "repeat_penalty": 1.1, "num_thread": 3,
    }  # fmt: skip
    found = llama.chat("small", QUESTION, options=options)
    assert found.message.content == wanted.choices[0].message.content
    short = llama.chat("small", QUESTION, options={"num_predict": 3, "seed": -1})
    assert (short.done_reason, short.eval_count) == ("length", 3)


def test_options_that_are_not_there_are_told(http: httpx.Client) -> None:
    options = {"num_predict": -1, "mirostat": 1, "num_gpu": 9, "temperature": 0, "tfs_z": None}
    body = {"model": "small", "messages": QUESTION, "stream": False, "options": options}
    found = http.post("/api/chat", json=body)
    assert found.status_code == 200
    assert found.headers["x-squall-ignored"] == "options.mirostat"


class Answer(BaseModel):
    city: str
    old: bool


def test_formats(llama: ollama.Client) -> None:
    shape = Answer.model_json_schema()
    options = {"temperature": 0, "num_predict": 60}
    found = llama.chat("small", QUESTION, format=shape, options=options)
    Answer.model_validate_json(found.message.content or "")
    whole = llama.generate("small", "Tell of Paris.", format=shape, options=options)
    Answer.model_validate_json(whole.response or "")
    begun = llama.generate("small", "Paris as JSON", format="json", options=options)
    assert (begun.response or "").lstrip().startswith("{")


def test_logprobs(llama: ollama.Client, client: openai.OpenAI) -> None:
    wanted = client.chat.completions.create(
        model="small", messages=QUESTION, temperature=0, max_tokens=3, logprobs=True,
        top_logprobs=2,
    ).choices[0].logprobs  # fmt: skip
    assert wanted is not None
    options = {"temperature": 0, "num_predict": 3}
    fields: dict[str, Any] = {"options": options, "logprobs": True, "top_logprobs": 2}
    found = llama.chat("small", QUESTION, **fields)
    tokens = [(one.token, one.logprob) for one in found.logprobs or ()]
    assert tokens == [(one.token, one.logprob) for one in wanted.content or ()]
    streamed_ = [one for part in llama.chat("small", QUESTION, stream=True, **fields)
                 for one in part.logprobs or ()]  # fmt: skip
    assert [(one.token, one.logprob) for one in streamed_] == tokens
    one = llama.generate("small", QUESTION[0]["content"], **fields).logprobs
    assert [(each.token, each.logprob) for each in one or ()] == tokens


def test_async(server: Process, client: openai.OpenAI) -> None:
    async def ask() -> tuple[str, str]:
        async with ollama.AsyncClient(host=server.url) as llama:
            whole = await llama.chat("small", QUESTION, options=GREEDY)
            stream = await llama.chat("small", QUESTION, options=GREEDY, stream=True)
            parts = [part.message.content or "" async for part in stream]
            return whole.message.content or "", "".join(parts)

    assert set(asyncio.run(ask())) == {said(client)}


def dialect(**fields: Any) -> OllamaDialect:
    body = OllamaChatBody.model_validate({"model": "m", **fields})
    return OllamaDialect(body, "m", "1")


@pytest.mark.parametrize("name", ANSWERS)
def test_streams_and_wholes_are_told_alike(name: str) -> None:
    """Whatever is said, thought and called, the whole has it and a stream adds up to it."""
    deltas, reason = ANSWERS[name]
    job = MadeUp(deltas, reason)
    whole = json.loads(asyncio.run(dialect().whole(job)))  # type: ignore[arg-type]
    *parts, last = map(json.loads, streamed(dialect(), job).splitlines())  # type: ignore[arg-type]
    assert last["done"]
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for part in parts:
        for key, value in part["message"].items():
            if key != "role":
                message[key] = message[key] + value if key in message else value
    assert message == whole["message"]
    assert (
        whole["done_reason"] == last["done_reason"] == ("length" if reason == "length" else "stop")
    )
    ollama.ChatResponse.model_validate(whole)


def test_calls_and_thoughts() -> None:
    deltas, reason = ANSWERS["all"]
    whole = json.loads(asyncio.run(dialect().whole(MadeUp(deltas, reason))))  # type: ignore[arg-type]
    (call,) = whole["message"].pop("tool_calls")
    assert call.pop("id")  # which Zed needs
    assert call == {"function": {"name": "f", "arguments": {}}}
    assert whole["message"] == {"role": "assistant", "content": "AB", "thinking": "So"}


def test_tools_and_their_results_reach_the_model() -> None:
    """Ids, which Ollama has not, are made up, by the order and names of calls."""
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    other = {"function": {"name": "g", "arguments": {}}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": "", "thinking": "Hm", "tool_calls": [call, other]},
        {"role": "tool", "content": "2", "tool_name": "g"},
        {"role": "tool", "content": "1", "tool_name": "f"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = OllamaChatBody.model_validate({"name": "m", "messages": messages, "tools": [tool]})
    asked = body.request(model="m")
    _, said, first, second = asked.messages
    assert isinstance(said, dict)
    assert said["thinking"] == "Hm"
    assert [c["id"] for c in said["tool_calls"]] == ["call00000", "call00001"]
    assert said["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert (first["tool_call_id"], second["tool_call_id"]) == ("call00001", "call00000")  # type: ignore[index]
    assert [tool.name for tool in asked.offer().callable] == ["f"]


def test_images_reach_the_model() -> None:
    said = {"role": "user", "content": "What is it?", "images": ["aGk=", "eW91"]}
    chat = OllamaChatBody.model_validate({"model": "m", "messages": [said]}).request(model="m")
    fields = {"model": "m", "prompt": "What is it?", "images": said["images"]}
    generated = GenerateBody.model_validate(fields).request(model="m")
    assert isinstance(generated, ChatCompletionRequest)
    for asked in (chat, generated):
        assert [part["source"] for part in images_of(asked.messages)] == ["aGk=", "eW91"]
        (message,) = asked.messages
        assert isinstance(message, dict)
        assert message["content"][0] == {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize(("think", "wanted"), [
    (True, {"enable_thinking": True}), (False, {"enable_thinking": False}), (None, {}),
    ("high", {"reasoning_effort": "high"}),
])  # fmt: skip
def test_think(think: Any, wanted: dict[str, Any]) -> None:
    body = OllamaChatBody.model_validate({"model": "m", "messages": QUESTION, "think": think})
    assert dict(body.request(model="m").template_kwargs) == wanted


@pytest.fixture(scope="module")
def several(model: Model) -> Iterator[tuple[ollama.Client, MadeUpEmbedder, Any]]:
    """A model that is loaded when it is asked for, one that stays, and an embedder."""
    embedder = MadeUpEmbedder()

    def opened() -> Model:
        return Model.open(context=256, engine=EngineConfig(max_seqs=2, max_queue=4))

    models = {
        "stays": model, "lazy": Lazy("text", opened), "vectors": embedder,
        "headers": Lazy("text", Opening(context=256)),
    }  # fmt: skip
    with serving(models) as running, ollama.Client(host=running.url) as found:
        yield found, embedder, running


def test_models(several: tuple[ollama.Client, MadeUpEmbedder, Any]) -> None:
    llama, _, running = several
    found = {one.model: one for one in llama.list().models}
    assert found.keys() == {"stays:latest", "lazy:latest", "headers:latest", "vectors:latest"}
    stays = found["stays:latest"]
    assert stays.size is not None
    assert stays.size > 50_000_000
    assert len(stays.digest or "") == 64
    details = stays.details
    assert details is not None
    assert (details.format, details.family, details.quantization_level) == ("gguf", "llama", "Q4_1")
    assert details.parameter_size == "134.48M"
    shown = llama.show("stays")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.embedding_length"] == 576
    assert shown.modelinfo["llama.context_length"] == 1024  # that of the server
    assert "im_start" in (shown.template or "")
    assert shown.capabilities == ["completion", "tools"]
    assert llama.show("vectors").capabilities == ["embedding"]
    assert llama.show("lazy").capabilities == ["completion"]
    headers = llama.show("headers")  # which nobody has loaded
    assert (headers.template, headers.capabilities) == (shown.template, shown.capabilities)
    count = "general.parameter_count"
    assert headers.modelinfo is not None
    assert headers.modelinfo.pop(count) == pytest.approx(shown.modelinfo.pop(count), rel=1e-3)
    assert headers.modelinfo == {**shown.modelinfo, "llama.context_length": 256}
    assert headers.details == found["headers:latest"].details
    assert headers.details is not None
    assert (headers.details.format, headers.details.quantization_level) == ("gguf", "Q4_1")
    cards = httpx.get(f"{running.url}/v1/models").json()["data"]
    assert {card["id"]: card["capabilities"] for card in cards} == {
        "stays": ["completion", "tools"], "lazy": ["completion"], "vectors": ["embedding"],
        "headers": ["completion", "tools"],
    }  # fmt: skip
    assert {card["state"] for card in cards if card["id"] in {"lazy", "headers"}} == {"unloaded"}
    with pytest.raises(ollama.ResponseError, match="there is no model 'other'") as raised:
        llama.show("other")
    assert raised.value.status_code == 404
    version = httpx.get(f"{running.url}/api/version").json()["version"]
    assert [part.isdigit() for part in version.split(".")] == [True] * 3


def test_loading_and_unloading(several: tuple[ollama.Client, MadeUpEmbedder, Any]) -> None:
    llama, _, running = several

    def loaded() -> set[str | None]:
        return {one.model for one in llama.ps().models}

    assert loaded() == {"stays:latest", "vectors:latest"}
    found = llama.generate("lazy", keep_alive="10m")
    assert (found.done_reason, found.response, found.done) == ("load", "", True)
    (lazy,) = (one for one in llama.ps().models if one.model == "lazy:latest")
    assert lazy.context_length == 256
    assert lazy.expires_at is not None
    assert 590 < (lazy.expires_at - datetime.now(lazy.expires_at.tzinfo)).total_seconds() < 601
    running.service.standing("lazy").used_s -= 300  # the time runs while nobody uses it
    (lazy,) = (one for one in llama.ps().models if one.model == "lazy:latest")
    assert lazy.expires_at is not None
    assert 290 < (lazy.expires_at - datetime.now(lazy.expires_at.tzinfo)).total_seconds() < 301
    assert llama.chat("lazy", []).done_reason == "load"
    ended = llama.chat("lazy", [], keep_alive=0)
    assert (ended.done_reason, ended.message.content) == ("unload", "")
    assert loaded() == {"stays:latest", "vectors:latest"}
    assert llama.show("lazy").modelinfo["llama.block_count"] == 30  # type: ignore[index]
    # A request loads it, and with 0 it is gone afterwards.
    assert llama.generate("lazy", "Hi", keep_alive=0, options={"num_predict": 2}).response
    while "lazy:latest" in loaded():
        pass
    # What one request said of it is over with that.
    assert llama.generate("lazy", "Hi", options={"num_predict": 2}).response
    assert "lazy:latest" in loaded()
    with pytest.raises(ollama.ResponseError, match="pinned"):
        llama.generate("stays", keep_alive=0)


def test_pull(several: tuple[ollama.Client, MadeUpEmbedder, Any]) -> None:
    llama, _, _ = several
    assert llama.pull("stays").status == "success"
    assert [part.status for part in llama.pull("vectors:latest", stream=True)][-1] == "success"
    for stream in (True, False):
        with pytest.raises(ollama.ResponseError, match="there is no model 'llama9'"):
            list(llama.pull("llama9", stream=stream))


def test_embeddings(several: tuple[ollama.Client, MadeUpEmbedder, Any]) -> None:
    llama, embedder, _ = several
    found = llama.embed("vectors", ["one", "two"])
    wanted = embedder.embed(["one", "two"])
    assert np.array_equal(np.float32(found.embeddings), wanted.vectors)
    assert found.prompt_eval_count == 6
    assert found.total_duration
    (alone,) = llama.embed("vectors:latest", "one", dimensions=3).embeddings
    assert np.array_equal(np.float32(alone), embedder.embed(["one"], dimensions=3).vectors[0])
    old = llama.embeddings("vectors", "one").embedding
    assert np.array_equal(np.float32(old), embedder.vector("one"))
    assert llama.embed("vectors", "long" * 99).prompt_eval_count == embedder.context
    with pytest.raises(ollama.ResponseError, match="this model reads 64"):
        llama.embed("vectors", "long" * 99, truncate=False)
    with pytest.raises(ollama.ResponseError, match="answers in text"):
        llama.embed("stays", "x")
    with pytest.raises(ollama.ResponseError, match="embeddings, not text"):
        llama.chat("vectors", QUESTION)


@pytest.mark.parametrize(("path", "fields", "named"), [
    ("/api/chat", {"messages": 5}, "messages"),
    ("/api/chat", {"messages": [{"content": "x"}]}, "role"),
    ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": 5}]}, "images"),
    ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["eA=="]}]}, "images"),
    ("/api/chat", {"messages": [{"role": "tool", "content": "x"}], "tools": 5}, "tools"),
    ("/api/chat", {"messages": QUESTION, "options": {"temperature": -1}}, "temperature"),
    ("/api/chat", {"messages": QUESTION, "options": {"stop": 5}}, "stop"),
    ("/api/chat", {"messages": QUESTION, "options": 5}, "options"),
    ("/api/chat", {"messages": QUESTION, "format": "xml"}, "format"),
    ("/api/chat", {"messages": QUESTION, "format": {"type": "nothing"}}, "nothing"),
    ("/api/chat", {"messages": QUESTION, "keep_alive": "soon"}, "keep_alive"),
    ("/api/chat", {"messages": QUESTION, "think": "hard"}, "reasoning_effort"),
    ("/api/generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
    ("/api/generate", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("/api/generate", {"prompt": "x", "raw": True, "images": ["eA=="]}, "images"),
    ("/api/generate", {"prompt": "x", "raw": True, "logprobs": True}, "logprobs"),
    ("/api/generate", {"prompt": "word " * 5000}, "context"),
    ("/api/embeddings", {"input": "x"}, "prompt"),
    ("/api/generate", {"prompt": "x", "model": None}, "model"),
    ("/api/embed", {"input": []}, "makes embeddings"),
    ("/api/show", {"model": 5}, "model"),
])  # fmt: skip
def test_errors_are_as_ollama_has_them(
    http: httpx.Client, path: str, fields: dict[str, Any], named: str
) -> None:
    found = http.post(path, json={"model": "small", **fields})
    assert found.status_code == 400, found.text
    error = found.json()
    assert error.keys() == {"error"}
    assert named in error["error"]


def test_unknown_paths(http: httpx.Client) -> None:
    assert http.post("/api/copy", json={}).json().keys() == {"error"}
    assert http.get("/").text == "OK"


def test_keys(model: Model) -> None:
    with serving(model, api_keys=("secret",)) as running:
        for path in ("/api/tags", "/api/version", "/api/ps"):
            found = httpx.get(running.url + path)
            assert (found.status_code, found.json().keys()) == (401, {"error"})
        headers = {"Authorization": "Bearer secret"}
        with ollama.Client(host=running.url, headers=headers) as llama:
            assert llama.list().models


def test_a_client_that_leaves_frees_everything(model: Model) -> None:
    with in_thread(model) as running:
        body = {"model": "m", "messages": QUESTION, "options": {"num_predict": 500}}
        leave_in_the_middle(running, "/api/chat", body)


def test_a_silent_stream_stays_json(model: Model) -> None:
    """What is sent meanwhile is white space before the next line."""
    with in_thread(model, keep_alive_s=0.05) as running:
        running.held.hold()
        body = {"model": "m", "messages": QUESTION, "options": {"num_predict": 3}}
        with connect(running.port, post_bytes("/api/chat", body)) as connection:
            begun = read_until(connection, b"\r\n1\r\n ")
            running.held.let()
            text = (begun + read_until(connection, b"0\r\n\r\n")).decode()
        assert "event" not in text
    with in_thread(model, keep_alive_s=0.05) as running, ollama.Client(running.url) as llama:
        threading.Timer(0.3, running.held.let).start()
        running.held.hold()
        parts = [*llama.chat("m", QUESTION, stream=True, options={"num_predict": 3})]
        assert parts[-1].eval_count == 3
