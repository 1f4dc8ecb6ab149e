"""Anthropic's Messages, asked for with the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from servers import (
    Process,
    connect,
    events,
    in_thread,
    leave_in_the_middle,
    post_bytes,
    read_until,
)

from squall import Model

PATH = "/v1/messages"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"model": "small", "max_tokens": 24, "extra_body": {"temperature": 0}}


@pytest.fixture
def claude(server: Process) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as found:
        yield found


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


def said(client: openai.OpenAI, messages: list[Any]) -> tuple[str | None, int]:
    """What a chat says, and how many tokens it read."""
    found = client.chat.completions.create(
        model="small", temperature=0, max_tokens=24, messages=messages
    )
    assert found.usage is not None
    return found.choices[0].message.content, found.usage.prompt_tokens


def test_an_answer_is_what_a_chat_says(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    found = claude.messages.create(messages=QUESTION, **GREEDY)
    text, tokens = said(client, QUESTION)
    assert text_of(found) == text
    assert (found.stop_reason, found.role, found.model) == ("end_turn", "assistant", "small")
    usage = found.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == tokens
    count = claude.messages.count_tokens(model="small", messages=QUESTION)
    assert count.input_tokens == tokens


def test_a_stream_is_the_whole(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(messages=QUESTION, **GREEDY)
    with claude.messages.stream(messages=QUESTION, **GREEDY) as stream:
        names = [event.type for event in stream]
        found = stream.get_final_message()
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert (text_of(found), found.stop_reason) == (text_of(whole), whole.stop_reason)
    assert found.usage.output_tokens == whole.usage.output_tokens


def test_a_cut_answer(claude: anthropic.Anthropic) -> None:
    found = claude.messages.create(messages=QUESTION, **(GREEDY | {"max_tokens": 2}))
    assert found.stop_reason == "max_tokens"
    assert found.usage.output_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_which_stop_string_came(claude: anthropic.Anthropic, stream: bool) -> None:
    asked = GREEDY | {"messages": QUESTION, "stop_sequences": ["Rome", " Pa", "aris"]}
    if stream:
        with claude.messages.stream(**asked) as events:
            found: Any = events.get_final_message()
    else:
        found = claude.messages.create(**asked)
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", " Pa")
    assert text_of(found).endswith(" is")


def test_an_answer_that_the_client_has_begun(
    claude: anthropic.Anthropic, client: openai.OpenAI
) -> None:
    whole = text_of(claude.messages.create(messages=QUESTION, **GREEDY))
    begun = whole[: whole.index(" France")]
    messages: Any = [*QUESTION, {"role": "assistant", "content": begun}]
    assert begun + text_of(claude.messages.create(messages=messages, **GREEDY)) == whole
    asked: Any = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 24}
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    for stream in (False, True):
        found: Any = client.chat.completions.create(extra_body=fields, stream=stream, **asked)
        parts = [c.choices[0].delta for c in found] if stream else [found.choices[0].message]
        assert begun + "".join(part.content for part in parts) == whole
    with pytest.raises(openai.BadRequestError, match="continue_final_message"):
        client.chat.completions.create(
            extra_body=fields, model="small", messages=QUESTION, max_tokens=1
        )


def test_blocks_are_messages_of_a_chat(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    messages: Any = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "1 + 1"}, {"type": "text", "text": "?"}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "2", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "2", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {"role": "user", "content": "And 2 + 2?"},
    ]  # fmt: skip
    system: Any = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    found = claude.messages.create(messages=messages, system=system, **GREEDY)
    text, tokens = said(client, [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2 + 2?"},
    ])  # fmt: skip
    assert text_of(found) == text
    count = claude.messages.count_tokens(model="small", messages=messages, system=system)
    assert count.input_tokens == tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"user_id": "u"}, "service_tier": "auto"},
        {"system": "Be brief.", "stop_sequences": ["\n\n"]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": {"type": "disabled"}, "tools": []},
        {"output_config": {"effort": "low"}},
        {"output_config": {"effort": "max"}, "thinking": {"type": "adaptive"}},
        {"extra_headers": {"anthropic-version": "2099-01-01", "anthropic-beta": "x"}},
        {"extra_body": {"top_k": 5, "top_p": 0.9, "temperature": 0.5, "seed": 3}},
    ],
)
def test_fields_that_are_accepted(claude: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    found = claude.messages.create(messages=QUESTION, **(GREEDY | {"max_tokens": 2} | fields))
    assert found.usage.output_tokens == 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": 5}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "tool_use"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_result"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "a", "content": 5}],
                    }
                ]
            },
            "messages[0].content",
        ),
        ({"messages": [*QUESTION, {"role": "assistant", "content": ""}]}, "go on with"),
        (
            {
                "messages": [
                    *QUESTION,
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
                    },
                ]
            },
            "continue_final_message",
        ),
        ({"messages": QUESTION * 5000}, "messages"),
        ({"system": 5}, "system"),
        ({"system": [5]}, "system"),
        ({"temperature": 3e9}, None),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 100}, "stop"),
        (
            {
                "tools": [{"type": "web_search_20250305", "name": "web_search"}],
                "tool_choice": {"type": "tool", "name": "web_search"},
            },
            "tool_choice",
        ),
        ({"tools": [{"name": "f", "input_schema": 5}]}, None),
        ({"tools": [5]}, "tools"),
        ({"tool_choice": {"type": "some"}}, None),
        ({"tool_choice": {"type": "any"}}, None),
        ({"thinking": True}, "thinking"),
        ({"output_config": {"effort": 5}}, "effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, None),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_row_4_bad_fields_are_named(
    http: httpx.Client, fields: dict[str, Any], named: str | None
) -> None:
    body = {"messages": QUESTION, "max_tokens": 1} | fields
    response = http.post(PATH, json=body)
    if fields == {"temperature": 3e9}:
        assert response.status_code in (200, 400)
        return
    assert response.status_code == 400, response.text
    found = response.json()
    assert found.keys() == {"type", "error"}
    assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
    assert named is None or named in found["error"]["message"], found
    if "max_tokens" not in fields:
        assert http.post(f"{PATH}/count_tokens", json=body).status_code < 500


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"[" * 100_000])
def test_row_4_bodies_that_are_no_json(http: httpx.Client, data: bytes) -> None:
    for path in (PATH, f"{PATH}/count_tokens"):
        response = http.post(path, content=data)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_errors_are_those_the_client_knows(claude: anthropic.Anthropic, model: Model) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(messages=[{"role": "user", "content": "word " * 3000}], **GREEDY)
    assert "2048" in str(caught.value)
    kinds = {"wrong": anthropic.AuthenticationError, "key-a": anthropic.NotFoundError}
    with in_thread(model, api_keys=("key-a",), any_model=False) as running:
        for key, kind in kinds.items():
            other = anthropic.Anthropic(base_url=running.url, api_key=key, max_retries=0)
            with other, pytest.raises(kind):
                other.messages.create(messages=QUESTION, **GREEDY)
        headers = {"x-api-key": "key-a"}
        response = httpx.get(running.url + PATH, headers=headers)
        assert (response.status_code, response.json()["type"]) == (405, "error")
        response = httpx.post(f"{running.url}{PATH}/batches", headers=headers)
        assert response.json()["error"]["type"] == "not_found_error"


def test_pings_while_there_is_nothing_to_tell(model: Model) -> None:
    with in_thread(model, keep_alive_s=0.05) as running:
        running.held.hold()
        body = {"messages": QUESTION, "max_tokens": 5, "stream": True}
        with connect(running.port, post_bytes(PATH, body)) as connection:
            ping = b'event: ping\ndata: {"type": "ping"}\n\n'
            assert ping in read_until(connection, ping)
            running.held.let()
            seen = read_until(connection, b"event: message_stop")
        assert seen.index(b"event: message_start") < seen.index(b"event: content_block_start")


@pytest.mark.parametrize("stream", [True, False])
def test_row_1_a_client_that_leaves(model: Model, stream: bool) -> None:
    with in_thread(model) as running:
        body = {"messages": QUESTION, "max_tokens": 500, "stream": stream, "ignore_eos": True}
        leave_in_the_middle(running, PATH, body)


def test_row_s13_the_engine_dies_in_the_middle() -> None:
    with Model.open(context=256) as model, in_thread(model) as running:
        running.held.hold()
        body = {"messages": QUESTION, "max_tokens": 50, "stream": True, "ignore_eos": True}
        with connect(running.port, post_bytes(PATH, body)) as connection:
            running.held.let(4)
            seen = read_until(connection, b"content_block_delta")
            running.held.fail = RuntimeError("on purpose")
            running.held.let()
            seen += read_until(connection, b"0\r\n\r\n")
        last: Any = events(seen.decode())[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")
    assert "on purpose" not in json.dumps(last)
