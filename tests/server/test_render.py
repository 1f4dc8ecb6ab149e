"""/render and /tokenize: what a chat comes to, before anything is computed."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from servers import chat

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How it is outside.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}])
def test_render_is_what_a_chat_reads(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = chat("Hi <|im_end|>!", max_tokens=1, **fields)
    found = http.post("/render", json=body).json()
    ids = found["prompt_token_ids"]
    assert found["count"] == len(ids)
    assert found["max_model_len"] == 2048
    assert found["prompt"].endswith("<|im_start|>assistant\n")
    assert ("weather" in found["prompt"]) == (fields == {"tools": TOOLS})
    # The template's control tokens are such; a message's are text.
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == found["prompt"]
    assert (
        http.post("/tokenize", json={"messages": body["messages"]} | fields).json()["tokens"] == ids
    )
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("body", [{}, {"messages": []}, chat(tools=[5]), chat(tools=[{}])])
def test_bad_bodies(http: httpx.Client, body: dict[str, Any]) -> None:
    for path in ("/render", "/tokenize"):
        assert http.post(path, json=body).status_code == 400
