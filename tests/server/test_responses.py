"""OpenAI's Responses, asked for with the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from servers import (
    Running,
    connect,
    events,
    in_thread,
    leave_in_the_middle,
    post_bytes,
    read_until,
)

from squall import Model

PATH = "/v1/responses"
QUESTION = "What is the capital of France?"
GREEDY: dict[str, Any] = {"model": "small", "temperature": 0, "max_output_tokens": 24}


@pytest.fixture
def running(model: Model) -> Iterator[Running]:
    with in_thread(model, kept_responses=2, kept_bytes=20_000, keep_alive_s=0.05) as found:
        yield found


def said(client: openai.OpenAI, messages: list[Any]) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(
        model="small", temperature=0, max_tokens=24, messages=messages
    )


def test_an_answer_is_what_a_chat_says(client: openai.OpenAI) -> None:
    found = client.responses.create(input=QUESTION, **GREEDY)
    chat = said(client, [{"role": "user", "content": QUESTION}])
    assert found.output_text == chat.choices[0].message.content
    assert "Paris" in found.output_text
    assert found.status == "completed"
    assert chat.usage is not None
    assert found.usage is not None
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens
    assert (found.model, found.object, found.temperature) == ("small", "response", 0)


def test_a_stream_is_the_whole(client: openai.OpenAI) -> None:
    whole = client.responses.create(input=QUESTION, **GREEDY)
    with client.responses.stream(input=QUESTION, **GREEDY) as stream:
        names = [event.type for event in stream]
        found = stream.get_final_response()
    assert names[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert names[-1] == "response.completed"
    assert found.output_text == whole.output_text
    raw = client.responses.create(input=QUESTION, stream=True, **GREEDY)
    assert (
        "".join(e.delta for e in raw if e.type == "response.output_text.delta") == found.output_text
    )


@pytest.mark.parametrize("stream", [True, False])
def test_a_cut_answer_is_incomplete(client: openai.OpenAI, stream: bool) -> None:
    asked = GREEDY | {"max_output_tokens": 2, "input": QUESTION}
    if stream:
        *_, last = client.responses.create(stream=True, **asked)
        assert last.type == "response.incomplete"
        found = last.response
    else:
        found = client.responses.create(**asked)
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.output[0].status == "incomplete"  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [True, False])
def test_a_conversation_by_its_last_response(client: openai.OpenAI, stream: bool) -> None:
    """Turns that name the last one read what the whole conversation as input would."""
    history: list[Any] = []
    last: str | None = None
    for text in (QUESTION, "And of Italy?", "Which is larger?"):
        history.append({"role": "user", "content": text})
        asked = {"input": text, "previous_response_id": last, "instructions": "Be brief.", **GREEDY}
        if stream:
            found: Any = [*client.responses.create(stream=True, **asked)][-1].response
        else:
            found = client.responses.create(**asked)
        whole = client.responses.create(input=history, instructions="Be brief.", **GREEDY)
        chat = said(client, [{"role": "system", "content": "Be brief."}, *history])
        assert found.output_text == whole.output_text == chat.choices[0].message.content
        assert found.usage.input_tokens == whole.usage.input_tokens  # type: ignore[union-attr]
        assert found.previous_response_id == last
        last = found.id
        history += [item.to_dict() for item in found.output]


def test_a_branch_does_not_change_what_it_began_from(client: openai.OpenAI) -> None:
    first = client.responses.create(input=QUESTION, **GREEDY)
    asked = {"previous_response_id": first.id, "input": "Why?", **GREEDY}
    one, other = client.responses.create(**asked), client.responses.create(**asked)
    assert one.output_text == other.output_text
    assert one.id != other.id


def test_ids_are_new_even_if_the_request_has_one(client: openai.OpenAI) -> None:
    headers = {"X-Request-Id": "mine"}
    found = [client.responses.create(input="Hi", extra_headers=headers, **GREEDY) for _ in "ab"]
    assert found[0].id != found[1].id


def test_responses_are_kept_unless_that_is_not_wanted(client: openai.OpenAI) -> None:
    found = client.responses.create(input=QUESTION, metadata={"a": "b"}, **GREEDY)
    assert client.responses.retrieve(found.id).to_dict() == found.to_dict()
    assert found.metadata == {"a": "b"}
    client.responses.delete(found.id)
    other = client.responses.create(input=QUESTION, store=False, **GREEDY)
    for id_ in (found.id, other.id, "resp_nothing"):
        for ask in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.NotFoundError):
                ask(id_)
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(input="Hi", previous_response_id=id_, **GREEDY)
        assert caught.value.param == "previous_response_id"


def test_a_head_is_a_get(client: openai.OpenAI, http: httpx.Client) -> None:
    found = client.responses.create(input="Hi", **GREEDY)
    response = http.head(f"{PATH}/{found.id}")
    assert (response.status_code, response.content) == (200, b"")


def test_the_oldest_go_when_there_are_too_many(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as http:

        def ask(text: str, **fields: Any) -> str:
            response = http.post(PATH, json={"input": text, "max_output_tokens": 1} | fields)
            return str(response.json()["id"])

        def status(id_: str) -> int:
            return http.get(f"{PATH}/{id_}").status_code

        one, two = ask("1"), ask("2")
        assert status(one) == 200  # used: two is the oldest now
        three = ask("3")
        assert [status(id_) for id_ in (one, two, three)] == [200, 404, 200]
        huge = ask("word " * 300, metadata={"a": "b" * 20_000})
        assert [status(id_) for id_ in (one, three, huge)] == [200, 200, 404]
        large = ask("x", metadata={"a": "b" * 18_400})
        assert [status(id_) for id_ in (one, three, large)] == [404, 404, 200]
        assert http.delete(f"{PATH}/{large}").json()["deleted"]
    assert running.service.kept._bytes == 0


def test_tenants_do_not_see_each_others(model: Model) -> None:
    with in_thread(model, api_keys=("a", "b")) as running:
        url = f"{running.url}/v1"
        with openai.OpenAI(base_url=url, api_key="a", max_retries=0) as one:
            found = one.responses.create(input="Hi", **GREEDY)
            with openai.OpenAI(base_url=url, api_key="b", max_retries=0) as other:
                with pytest.raises(openai.NotFoundError):
                    other.responses.retrieve(found.id)
                with pytest.raises(openai.NotFoundError):
                    other.responses.delete(found.id)
                with pytest.raises(openai.NotFoundError):
                    other.responses.create(input="Hi", previous_response_id=found.id, **GREEDY)
            assert one.responses.retrieve(found.id).id == found.id


def test_what_does_not_fit_is_cut_if_that_is_wanted() -> None:
    asked = {**GREEDY, "input": "word " * 500, "max_output_tokens": 2}
    with (
        Model.open(context=256) as model,
        in_thread(model) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**asked)
        assert caught.value.code == "context_length_exceeded"
        found = client.responses.create(truncation="auto", **asked)
    assert found.usage is not None
    assert found.usage.input_tokens_details.dropped_tokens > 250  # type: ignore[attr-defined]
    assert found.truncation == "auto"


ITEMS: list[Any] = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Brief."}]},
    {
        "role": "user",
        "content": [{"type": "input_text", "text": "1 + 1"}, {"type": "input_text", "text": "?"}],
    },
    {
        "type": "reasoning", "id": "rs_1", "summary": [],
        "content": [{"type": "reasoning_text", "text": "2"}],
    },
    {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
    {
        "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "2", "annotations": [], "logprobs": []}],
    },
    {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": " No."}]},
    {"role": "user", "content": "And 2 + 2?"},
]  # fmt: skip


def test_items_are_messages_of_a_chat(client: openai.OpenAI) -> None:
    found = client.responses.create(input=ITEMS, instructions="Be kind.", **GREEDY)
    messages = [
        {"role": "system", "content": "Be kind.\n\nBrief."}, {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2 No."}, {"role": "user", "content": "And 2 + 2?"},
    ]  # fmt: skip
    chat = said(client, messages)
    assert found.output_text == chat.choices[0].message.content
    assert found.usage is not None
    assert chat.usage is not None
    assert found.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True, "user": "u", "service_tier": "auto", "prompt_cache_key": "k"},
        {"include": ["reasoning.encrypted_content"], "text": {"format": {"type": "text"}}},
        {"background": False, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"reasoning": {"effort": "low", "summary": "auto"}, "truncation": "disabled"},
        {"stream_options": {"include_obfuscation": False}},
        {"reasoning": {"effort": "xhigh"}},
        {"extra_body": {"top_k": 5, "seed": 3, "repetition_penalty": 1.1, "stop": ["x"]}},
    ],
)
def test_fields_that_are_accepted(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    found = client.responses.create(**(GREEDY | {"input": "Hi", "max_output_tokens": 2} | fields))
    assert found.error is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "messages"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{}]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0]"),
        ({"input": [{"role": 5, "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [5]}]}, "input[0].content"),
        (
            {
                "input": [
                    {"role": "user", "content": "x"},
                    {"type": "reasoning", "summary": []},
                    {"role": "user", "content": [{"type": "input_image"}]},
                ],
                "instructions": "Look.",
            },
            "input[2].content",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": ["x"], "role": "user", "content": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": 5}]}, None),
        ({"input": [{"type": "function_call_output", "call_id": 5, "output": "x"}]}, "input[0]"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": 5}]},
            "input[0].output",
        ),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "x"}] * 5000}, "messages"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, None),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": {"type": "web_search"}}, None),
        ({"tool_choice": {"type": "function", "name": "f"}}, None),
        ({"tool_choice": {"type": "allowed_tools", "tools": [5], "mode": "auto"}}, None),
        ({"tool_choice": {"type": "allowed_tools", "tools": 5}}, None),
        ({"tool_choice": 5}, "tool_choice"),
        ({"text": {"format": 5}}, None),
        ({"text": {"format": {"type": "json_schema"}}}, None),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, None),
        ({"text": {"format": {"type": "xml"}}}, None),
        ({"reasoning": {"effort": "endless"}}, "reasoning_effort"),
        ({"reasoning": "high"}, "reasoning"),
        ({"truncation": "middle"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_row_4_bad_fields_are_named(
    http: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    response = http.post(PATH, json={"input": "Hi", "max_output_tokens": 1} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param, error


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_what_is_repeated_is_json(http: httpx.Client, number: str) -> None:
    tool = f'{{"type": "function", "name": "f", "parameters": {{"default": {number}}}}}'
    data = f'{{"input": "Hi", "max_output_tokens": 1, "tools": [{tool}], "tool_choice": "none"}}'
    response = http.post(PATH, content=data)
    assert "NaN" not in response.text
    assert "Infinity" not in response.text
    assert response.json()["tools"][0]["parameters"] == {"default": None}


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"input": "\\ud800"}']
)
def test_row_4_bodies_that_are_no_json(http: httpx.Client, data: bytes) -> None:
    assert http.post(PATH, content=data).status_code == 400


def test_unknown_fields_are_told(http: httpx.Client, model: Model) -> None:
    body = {"input": "Hi", "max_output_tokens": 1, "max_tokns": 5}
    assert http.post(PATH, json=body).headers["x-squall-ignored"] == "max_tokns"
    with in_thread(model, strict_fields=True) as running:
        response = httpx.post(running.url + PATH, json=body)
    assert response.json()["error"]["code"] == "unknown_parameter"


def test_what_items_have_besides_their_text_is_not_kept(running: Running) -> None:
    last = None
    for _ in range(3):
        junk = {"type": "reasoning", "summary": ["x" * 100] * 1000}
        text = {"type": "input_text", "text": "Hi", "more": ["x" * 100] * 1000}
        items = [{"role": "user", "content": [text]}, junk]
        body = {"input": items, "previous_response_id": last, "max_output_tokens": 1}
        last = httpx.post(running.url + PATH, json=body).json()["id"]
        assert 0 < running.service.kept._bytes < 5000


@pytest.mark.parametrize("stream", [True, False])
def test_row_1_a_client_that_leaves(running: Running, stream: bool) -> None:
    body = {"input": "Hi!", "max_output_tokens": 500, "stream": stream, "ignore_eos": True}
    leave_in_the_middle(running, PATH, body)
    assert running.service.kept._bytes == 0


def test_row_34_a_stream_that_is_silent_and_one_that_fails(model: Model) -> None:
    with in_thread(model, keep_alive_s=0.05) as running:
        running.held.hold()
        body = {"input": "Hi", "max_output_tokens": 5, "stream": True, "ignore_eos": True}
        with connect(running.port, post_bytes(PATH, body)) as connection:
            seen = read_until(connection, b": keep-alive\n\n")
            running.held.let()
            seen += read_until(connection, b"response.incomplete")
        assert b"event: response.created" in seen


def test_row_s13_the_engine_dies_in_the_middle() -> None:
    with Model.open(context=256) as model, in_thread(model) as running:
        running.held.hold()
        body = {"input": "Hi", "max_output_tokens": 50, "stream": True, "ignore_eos": True}
        with connect(running.port, post_bytes(PATH, body)) as connection:
            running.held.let(4)
            seen = read_until(connection, b"output_text.delta")
            running.held.fail = RuntimeError("on purpose")
            running.held.let()
            seen += read_until(connection, b"0\r\n\r\n")
        last: Any = events(seen.decode())[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert "on purpose" not in json.dumps(last)
