"""The events of /v1/responses and /v1/messages, as official clients read them; answers made up."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from made_up import ANSWERS, MadeUp, says, streamed, transport
from servers import events

from squall.server.anthropic_messages import Messages, MessagesBody
from squall.server.errors import ApiError
from squall.server.kept import Kept
from squall.server.openai_responses import Responses, ResponsesBody

ASKED = {"model": "m", "input": "Hi", "store": False}
ORDER = re.compile(
    "created in_progress "
    "(output_item.added ("
    "content_part.added (output_text.delta )*output_text.done content_part.done |"
    "content_part.added (reasoning_text.delta )*reasoning_text.done content_part.done |"
    "(function_call_arguments.delta )*function_call_arguments.done "
    ")output_item.done )*"
    "(completed|incomplete|failed) "
)


def responses(**fields: Any) -> Responses:
    body = ResponsesBody.parse(json.dumps(ASKED | fields).encode())
    told = Responses(Kept(10, 10**6), "", body, "m", "id")
    told._said = b"[]"
    told.hex, told.id, told.created = "h", "resp_h", 1
    return told


def messages() -> Messages:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    told = Messages(MessagesBody.parse(json.dumps(body).encode()), "m", "id")
    told.id = "msg_h"
    return told


def check_order(data: list[dict[str, Any]]) -> None:
    """Names in order, numbers without a gap, and parts that join to what the done events say."""
    names = "".join(event["type"].removeprefix("response.") + " " for event in data)
    assert ORDER.fullmatch(names), names
    assert [event["sequence_number"] for event in data] == list(range(len(data)))
    joined = ""
    for event in data:
        if event["type"].endswith("added"):
            joined = ""
        elif event["type"].endswith(".delta"):
            joined += event["delta"]
        elif event["type"].endswith(("text.done", "arguments.done")):
            assert event.get("text", event.get("arguments")) == joined
    done = [e["item"] for e in data if e["type"] == "response.output_item.done"]
    assert data[-1]["response"]["output"] == done


@pytest.mark.parametrize("name", ANSWERS)
def test_responses_stream_is_the_whole(name: str) -> None:
    deltas, reason = ANSWERS[name]
    whole = json.loads(asyncio.run(responses().whole(MadeUp(deltas, reason))))  # type: ignore[arg-type]
    content = streamed(responses(), MadeUp(deltas, reason))
    check_order(events(content.decode()))
    seen: list[Any] = []
    with openai.OpenAI(api_key="x", http_client=transport(content)) as client:
        with client.responses.stream(model="m", input="Hi") as stream:
            seen += stream
        assert seen[-1].type == f"response.{whole['status']}"
        if whole["status"] == "completed":
            assert stream.get_final_response().to_dict() == seen[-1].response.to_dict()
    last: Any = events(content.decode())[-1]["response"]
    assert last == whole
    cut = reason == "length"
    assert whole["status"] == ("incomplete" if cut else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    assert [item["status"] for item in whole["output"]][-1] == whole["status"]
    assert openai.types.responses.Response.model_validate(whole).output_text == "".join(
        delta.content or "" for delta in deltas
    )
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 16


@pytest.mark.parametrize("name", ANSWERS)
def test_messages_stream_is_the_whole(name: str) -> None:
    deltas, reason = ANSWERS[name]
    text = asyncio.run(messages().whole(MadeUp(deltas, reason)))  # type: ignore[arg-type]
    content = streamed(messages(), MadeUp(deltas, reason))
    asked: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    client = anthropic.Anthropic(api_key="x", http_client=transport(content, httpx2))
    with client, client.messages.stream(**asked) as stream:
        found = stream.get_final_message().to_dict()
    whole = json.loads(text)
    for block in found["content"]:
        block.pop("parsed_output", None)
    assert {name: found.get(name) for name in whole} == whole
    assert anthropic.types.Message.model_validate(whole).stop_reason == {
        "stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"
    }[reason]  # fmt: skip
    assert whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"] == 20
    names = " ".join(event["type"] for event in events(content.decode()))
    block = "content_block_start (content_block_delta )*content_block_stop "
    assert re.fullmatch(f"message_start ({block})+message_delta message_stop", names)


def test_kinds_of_sections() -> None:
    deltas, reason = ANSWERS["all"]
    told = responses()
    streamed(told, MadeUp(deltas, reason))
    kinds = [item["type"] for item in told.told()["output"]]
    assert kinds == ["reasoning", "message", "function_call", "message"]
    blocks = messages()
    streamed(blocks, MadeUp(deltas, reason))
    assert [b["type"] for b in blocks.told()["content"]] == ["thinking", "text", "tool_use", "text"]


@pytest.mark.parametrize("after", range(5))
def test_a_failure_in_the_middle(after: int) -> None:
    """Before the first chunk too, as comments may have begun the stream."""

    async def parts(told: Any) -> bytes:
        found, job = b"", MadeUp(says("Hey"))
        chunks = job.chunks_async()
        for _ in range(after):
            found += told.part(job, await anext(chunks))
        return found + told.failed(ApiError(503, "gone", "engine_stopped", "server_error"))

    data = events(asyncio.run(parts(responses())).decode())
    check_order(data)
    assert [event["response"]["status"] for event in data[:2]] == ["in_progress"] * 2
    assert data[-1]["type"] == "response.failed"
    assert data[-1]["response"]["status"] == "failed"
    assert data[-1]["response"]["error"] == {"code": "server_error", "message": "gone"}
    content = asyncio.run(parts(messages()))
    assert events(content.decode())[0]["type"] == "message_start"
    asked: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    client = anthropic.Anthropic(api_key="x", http_client=transport(content, httpx2))
    with pytest.raises(anthropic.APIError) as caught:
        client.messages.stream(**asked).__enter__().until_done()
    client.close()
    assert caught.value.body == {
        "type": "error", "error": {"type": "overloaded_error", "message": "gone"}
    }  # fmt: skip


def test_arguments_that_are_no_object() -> None:
    from made_up import calls

    for arguments in ("[1]", "nonsense", '{"a": 1e999}', '{"a": NaN}', "[" * 10_000):
        text = asyncio.run(messages().whole(MadeUp(calls(0, "f", arguments), "tool_calls")))  # type: ignore[arg-type]
        assert json.loads(text)["content"][0]["input"] == {}
