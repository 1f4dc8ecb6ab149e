"""What editors, agents and web pages send, written down by hand from their sources, is answered.

requests/*.json has a list for each: its path, headers and body. `says` is what the model finds in
the prompt, and `calls` what it calls then; otherwise it says OK. `ignored` is what is to be told
as without effect, and `origin` is true for what comes from a web page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic.types
import httpx
import ollama
import openai.types.responses
import pytest
from embedders import MadeUpEmbedder
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter
from scripted import scripted
from servers import Process, Running, events, serving
from test_fim import tiny  # noqa: F401

from squall import Model

FILES = sorted((Path(__file__).parent / "requests").glob("*.json"))
ALL = [(file.stem, each) for file in FILES for each in json.loads(file.read_text())]
FILLS = pytest.mark.slow("a model that can fill in is made with PyTorch")
CALL = "<tool_call>\n{}\n</tool_call>"
SCRIPT = {each["says"]: CALL.format(json.dumps(each["calls"])) for _, each in ALL if "says" in each}
ORIGIN = "http://localhost:3000"
EVENTS = TypeAdapter[Any](openai.types.responses.ResponseStreamEvent)
MESSAGE_EVENTS = TypeAdapter[Any](anthropic.types.RawMessageStreamEvent)


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    models = {"small": model, "texts": MadeUpEmbedder(context=999)}
    with scripted(model, SCRIPT | {"": "OK"}), serving(models, origins=(ORIGIN,)) as running:
        yield running.url


def given() -> Iterator[Any]:
    for program, asked in ALL:
        marks = [FILLS] if "suffix" in asked.get("body", {}) else []
        yield pytest.param(program, asked, marks=marks, id=f"{program}: {asked['name']}")


@pytest.mark.parametrize(("program", "asked"), [*given()])
def test_requests(
    url: str, server: Process, program: str, asked: Any, request: pytest.FixtureRequest
) -> None:
    path, body = asked["path"], asked.get("body", {})
    root = server.url if path == "/v1/completions" else url  # which no script is for
    if "suffix" in body:
        filling: tuple[Running, Any] = request.getfixturevalue("tiny")
        root = filling[0].url
    with httpx.Client(base_url=root, timeout=60) as http:
        method = asked.get("method", "POST")
        content = json.dumps(body).encode() if method == "POST" else b""
        found = http.request(method, path, headers=asked["headers"], content=content)
    assert found.status_code == 200, found.text
    assert found.headers.get("x-squall-ignored") == asked.get("ignored"), program
    if "origin" in asked:
        assert found.headers["access-control-allow-origin"] == ORIGIN
    READ[path.partition("?")[0]](found, body, asked.get("calls"))


def check_chat(found: httpx.Response, body: Any, calls: Any) -> None:
    if not body.get("stream"):
        (choice,) = ChatCompletion.model_validate(found.json(), strict=True).choices
        assert choice.message.content == "OK"
        return
    told = events(found.text)
    assert told.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(each, strict=True) for each in told]
    if body.get("stream_options", {}).get("include_usage"):
        last = chunks.pop()
        assert last.usage is not None
        assert last.choices == []
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    made = [call.function for delta in deltas for call in delta.tool_calls or () if call.function]
    text = "".join(delta.content or "" for delta in deltas)
    assert text == ("" if calls else "OK")
    assert chunks[-1].choices[0].finish_reason == ("tool_calls" if calls else "stop")
    if calls:
        check_call(made[0].name, "".join(each.arguments or "" for each in made), calls)


def check_call(name: str | None, arguments: str, calls: Any) -> None:
    assert {"name": name, "arguments": json.loads(arguments)} == calls


def check_completion(found: httpx.Response, body: Any, _: Any) -> None:
    told = events(found.text) if body.get("stream") else [found.json(), "[DONE]"]
    assert told.pop() == "[DONE]"
    last = openai.types.Completion.model_validate(told[-1], strict=True)
    assert last.choices[0].finish_reason in ("stop", "length")
    assert "".join(each["choices"][0]["text"] for each in told)


def check_response(found: httpx.Response, _: Any, calls: Any) -> None:
    told = [EVENTS.validate_python(each) for each in events(found.text)]
    assert [told[0].type, told[-1].type] == ["response.created", "response.completed"]
    (item,) = told[-1].response.output
    if calls:
        check_call(item.name, item.arguments, calls)
    else:
        assert item.content[0].text == "OK"


def check_message(found: httpx.Response, body: Any, calls: Any) -> None:
    if not body.get("stream"):
        message = anthropic.types.Message.model_validate(found.json(), strict=True)
        assert message.stop_reason == "max_tokens"
        return
    told = [MESSAGE_EVENTS.validate_python(each) for each in events(found.text)]
    assert [told[0].type, told[-1].type] == ["message_start", "message_stop"]
    assert told[-2].delta.stop_reason == ("tool_use" if calls else "end_turn")
    deltas = [each.delta for each in told if each.type == "content_block_delta"]
    if calls:
        block = next(each.content_block for each in told if each.type == "content_block_start")
        check_call(block.name, "".join(delta.partial_json for delta in deltas), calls)
    else:
        assert "".join(delta.text for delta in deltas) == "OK"


def check_ollama(kind: Any) -> Callable[[httpx.Response, Any, Any], None]:
    def check(found: httpx.Response, body: Any, calls: Any) -> None:
        lines = found.text.splitlines() if body.get("stream") else [found.text]
        told = [kind.model_validate_json(line) for line in lines]
        if kind is ollama.ChatResponse:
            assert [each.done for each in told] == [False] * (len(told) - 1) + [True]
            made = [call for each in told for call in each.message.tool_calls or ()]
            assert "".join(each.message.content or "" for each in told) == ("" if calls else "OK")
            assert [call.function.model_dump() for call in made] == ([calls] if calls else [])
        if kind is ollama.GenerateResponse:
            assert told[-1].done

    return check


def check_embeddings(found: httpx.Response, body: Any, _: Any) -> None:
    made = openai.types.CreateEmbeddingResponse.model_validate(found.json(), strict=True)
    assert [len(each.embedding) for each in made.data] == [8] * len(body["input"])


def check_ranks(found: httpx.Response, body: Any, _: Any) -> None:
    ranks = {each["index"]: each["relevance_score"] for each in found.json()["results"]}
    assert sorted(ranks) == list(range(len(body["documents"])))


def check_models(found: httpx.Response, _: Any, __: Any) -> None:
    ids = [openai.types.Model.model_validate(each).id for each in found.json()["data"]]
    assert ids == ["small", "texts"]


def check_count(found: httpx.Response, _: Any, __: Any) -> None:
    assert found.json()["input_tokens"] > 10


def check_version(found: httpx.Response, _: Any, __: Any) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", found.json()["version"])


def check_head(found: httpx.Response, _: Any, __: Any) -> None:
    assert found.content == b""


READ: dict[str, Callable[[httpx.Response, Any, Any], None]] = {
    "/": check_head,
    "/v1/models": check_models,
    "/v1/chat/completions": check_chat,
    "/v1/completions": check_completion,
    "/v1/responses": check_response,
    "/v1/messages": check_message,
    "/v1/messages/count_tokens": check_count,
    "/v1/embeddings": check_embeddings,
    "/v1/rerank": check_ranks,
    "/api/version": check_version,
    "/api/tags": check_ollama(ollama.ListResponse),
    "/api/ps": check_ollama(ollama.ProcessResponse),
    "/api/show": check_ollama(ollama.ShowResponse),
    "/api/chat": check_ollama(ollama.ChatResponse),
    "/api/generate": check_ollama(ollama.GenerateResponse),
    "/api/embed": check_ollama(ollama.EmbedResponse),
}
