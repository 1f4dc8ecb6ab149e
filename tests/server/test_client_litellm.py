"""litellm, which many programs go through, by both of its ways to a server of one's own."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from embedders import MadeUpEmbedder
from pydantic import BaseModel
from scripted import scripted
from servers import serving

from squall import Model

pytestmark = [
    pytest.mark.slow("the library itself takes seconds to import"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Item .* on TypedDict class:UserWarning"),
]

CALL = '<tool_call>\n{"name": "%s", "arguments": {"%s": "Rome"}}\n</tool_call>'
SCRIPT = {
    "json_tool_call": CALL % ("json_tool_call", "name"),  # what it makes of a form for Anthropic's
    "as JSON": '{"name": "Rome"}',
    "21 degrees": "Warm.",
    "How warm": CALL % ("weather", "city"),
    "Hello": "Hi!",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather", "description": "How warm it is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip


class City(BaseModel):
    name: str


@pytest.fixture(scope="module")
def root(model: Model) -> Iterator[str]:
    models = {"small": model, "texts": MadeUpEmbedder()}
    with scripted(model, SCRIPT), serving(models) as running:
        yield running.url


@pytest.fixture(params=["openai", "anthropic"])
def given(request: Any, root: str) -> Iterator[dict[str, Any]]:
    base = f"{root}/v1" if request.param == "openai" else root
    yield {"model": f"{request.param}/small", "api_base": base, "api_key": "any", "num_retries": 0}
    gc.collect()  # connections that it leaves open, while that is ignored


@pytest.fixture(scope="module")
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the internet for prices
    import litellm

    litellm.telemetry = False
    return litellm


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_chat(litellm: Any, given: Any) -> None:
    found = litellm.completion(messages=said("Hello"), **given)
    assert found.choices[0].message.content == "Hi!"
    assert found.usage.completion_tokens >= 1
    later = asyncio.run(litellm.acompletion(messages=said("Hello"), **given))
    assert later.choices[0].message.content == "Hi!"


def test_a_stream(litellm: Any, given: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(litellm.completion(messages=said("Hello"), **options, **given))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "Hi!"
    assert [part.usage.completion_tokens for part in parts if getattr(part, "usage", None)]


@pytest.mark.parametrize("stream", [False, True])
def test_tools(litellm: Any, given: Any, stream: bool) -> None:
    messages = said("How warm is it?")
    found = litellm.completion(messages=messages, tools=[WEATHER], stream=stream, **given)
    if stream:
        found = litellm.stream_chunk_builder(list(found), messages=messages)
    (choice,) = found.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    messages += [choice.message, result]
    found = litellm.completion(messages=messages, tools=[WEATHER], **given)
    assert found.choices[0].message.content == "Warm."


def test_an_answer_of_a_class(litellm: Any, given: Any) -> None:
    found = litellm.completion(messages=said("as JSON"), response_format=City, **given)
    assert City.model_validate_json(found.choices[0].message.content).name == "Rome"


@pytest.mark.parametrize("given", ["openai"], indirect=True)
def test_embeddings(litellm: Any, given: Any) -> None:
    found = litellm.embedding(input=["a", "b"], **(given | {"model": "openai/texts"}))
    assert [len(each["embedding"]) for each in found.data] == [8, 8]
