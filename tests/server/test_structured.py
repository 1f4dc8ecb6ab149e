"""Answers in a shape, tools and reasoning over HTTP, with the official client."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel
from servers import Process, events, in_thread

from squall import Model

sys.path.append(str(Path(__file__).parents[1] / "api"))
from scripted import scripted

QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
CHAT = "/v1/chat/completions"
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
     "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", "y", None]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"const": None}, {"type": "string", "pattern": "^[a-d]{2,4}$"}]},
    {"type": "integer", "minimum": 10, "maximum": 99},
]  # fmt: skip


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    unit: Literal["C", "F"]


class Report(BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: Literal[10, 20]


def test_no_request_waits_for_the_vocabulary(model: Model) -> None:
    """Nor do those beside it."""
    vars(model).pop("grammars", None)
    with in_thread(model):
        assert "_vocabulary" in vars(model.grammars)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_row_8_status_200_means_that_the_answer_fits(
    client: openai.OpenAI, schema: dict[str, Any], stream: bool
) -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    for strict in (None, False, True):
        wrapped["json_schema"] |= {"strict": strict}  # type: ignore[operator]
        given: Any = {"response_format": wrapped, "temperature": 1, "max_tokens": 200, "seed": 5}
        found = client.chat.completions.create(
            model="small", messages=QUESTION, stream=stream, **given
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in found)
        else:
            text = found.choices[0].message.content
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "null"}}, "not"),
        ({"type": "array", "items": {"type": "object", "dependentSchemas": {}}}, "dependent"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(a"}, "regex"),
        ({"type": "nothing"}, "nothing"),
        ({"$ref": "http://localhost/schema"}, "localhost"),
    ],
)
def test_row_8_what_cannot_be_enforced_is_an_error(
    client: openai.OpenAI, schema: dict[str, Any], named: str
) -> None:
    wrapped: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="small", messages=QUESTION, response_format=wrapped)
    body: Any = raised.value.body
    assert body["param"] == "response_format"
    assert named in body["message"]


def test_row_8_shapes_of_completions(client: openai.OpenAI) -> None:
    for name, value in (
        ("guided_regex", "[0-9]{4}"),
        ("structured_outputs", {"regex": "[0-9]{4}"}),
    ):
        found = client.completions.create(model="small", prompt="Year:", extra_body={name: value})
        assert re.fullmatch("[0-9]{4}", found.choices[0].text)


def test_parsing_into_a_class(client: openai.OpenAI) -> None:
    found = client.beta.chat.completions.parse(
        model="small", messages=QUESTION, response_format=Report, n=3, temperature=1, seed=2
    )
    for choice in found.choices:
        assert isinstance(choice.message.parsed, Report)
    with client.beta.chat.completions.stream(
        model="small", messages=QUESTION, response_format=Report
    ) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Report)


def test_a_call_parsed_into_a_class(client: openai.OpenAI) -> None:
    given: Any = {
        "model": "small", "messages": QUESTION, "tool_choice": "required",
        "tools": [openai.pydantic_function_tool(Weather, name="weather")],
        "parallel_tool_calls": False, "temperature": 1,
    }  # fmt: skip
    (choice,) = client.beta.chat.completions.parse(**given).choices
    (call,) = choice.message.tool_calls or ()
    assert choice.finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.beta.chat.completions.stream(**given) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        assert isinstance(done[0].parsed_arguments, Weather)
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"


def test_many_shapes_at_a_time_for_many_clients(server: Process) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        found = await client.chat.completions.create(
            model="small", messages=QUESTION, max_tokens=30, seed=number,
            extra_body={"guided_regex": f"[{number % 10}a-c]{{5}}"},
        )  # fmt: skip
        return found.choices[0].message.content or ""

    async def ask_all() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        async with client:
            together = await asyncio.gather(*(ask(client, number) for number in range(24)))
            assert [await ask(client, number) for number in range(24)] == together
        return together

    for number, text in enumerate(asyncio.run(ask_all())):
        assert re.fullmatch(f"[{number % 10}a-c]{{5}}", text)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "unit": "C"}}\n</tool_call>'
TOOLS: Any = [openai.pydantic_function_tool(Weather, name="weather")]


@pytest.fixture(scope="module")
def known(model: Model) -> Iterator[httpx.Client]:
    """A server of a model that calls a tool, and says what it is told."""
    script = {"20 degrees": "It has 20 degrees.", "Paris": f"I look.\n{CALL}", "Hi": "Hello."}
    with (
        scripted(model, script), in_thread(model) as running,
        httpx.Client(base_url=running.url, timeout=60) as http,
    ):  # fmt: skip
        yield http


@pytest.mark.parametrize("choice", ["auto", "required", "none", TOOLS[0]])
def test_rows_5_and_6_streams_join_and_reasons_are_right(known: httpx.Client, choice: Any) -> None:
    body = {"messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "seed": 1}
    for most in (1, 5, 10, 20, 30, 200):
        whole = known.post(CHAT, json=body | {"max_tokens": most}).json()["choices"][0]
        text = known.post(CHAT, json=body | {"max_tokens": most, "stream": True}).text
        client_side = _accumulated(events(text)[:-1])
        for message in (whole["message"], client_side["message"]):
            for call in message.get("tool_calls") or ():
                assert re.fullmatch("call_[0-9a-f]{24}", call.pop("id"))
        assert client_side == {k: v for k, v in whole.items() if k != "logprobs"}
        calls = whole["message"].get("tool_calls", [])
        if whole["finish_reason"] == "tool_calls":
            assert [json.loads(call["function"]["arguments"])["city"] for call in calls]
        else:
            assert whole["finish_reason"] == (
                "stop" if choice == "none" and most == 200 else "length"
            )
    assert bool(calls) == (choice != "none")


def _accumulated(chunks: list[Any]) -> dict[str, Any]:
    """What the official client makes of a stream."""
    from openai.lib.streaming.chat._completions import ChatCompletionStreamState

    state: Any = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(openai.types.chat.ChatCompletionChunk.model_validate(chunk))
    found = state.current_completion_snapshot.choices[0].model_dump(exclude_none=True)
    message = {"content": None, **found["message"]}
    for call in message.get("tool_calls") or ():
        call.pop("index", None)
        call["function"].pop("parsed_arguments", None)
    return {"finish_reason": found["finish_reason"], "index": 0, "message": message}


def test_ids_of_calls_are_new_even_if_the_request_has_one(known: httpx.Client) -> None:
    body = {"messages": QUESTION, "tools": TOOLS, "tool_choice": "required", "max_tokens": 64}
    seen = [known.post(CHAT, json=body, headers={"X-Request-Id": "mine"}).json() for _ in "ab"]
    first, second = (found["choices"][0]["message"]["tool_calls"][0]["id"] for found in seen)
    assert first != second


def test_a_result_is_answered(known: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{known.base_url}/v1", api_key="any", max_retries=0)
    with client:
        first = client.chat.completions.create(model="x", messages=QUESTION, tools=TOOLS)
        message: Any = first.choices[0].message
        assert message.content == "I look."
        (call,) = message.tool_calls
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"}
        second = client.chat.completions.create(
            model="x", messages=[*QUESTION, message, result], tools=TOOLS
        )
    assert second.choices[0].message.content == "It has 20 degrees."
    assert second.choices[0].finish_reason == "stop"
