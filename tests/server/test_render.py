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
    vllms = http.post("/v1/chat/completions/render", json=body).json()
    assert vllms == {"model": http.get("/v1/models").json()["data"][0]["id"], "token_ids": ids}
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == len(ids)


def test_completions_are_rendered(http: httpx.Client) -> None:
    """Texts and ids, one or several."""
    ids = http.post("/tokenize", json={"prompt": "The sea <|im_end|>"}).json()["tokens"]

    def rendered(prompt: object) -> list[list[int]]:
        found = http.post("/v1/completions/render", json={"prompt": prompt, "max_tokens": 1})
        return [each["token_ids"] for each in found.json()]

    assert rendered("The sea <|im_end|>") == rendered(ids) == [ids]
    assert rendered(["The sea <|im_end|>", "a"])[0] == ids
    assert rendered([[1, 2], ids]) == [[1, 2], ids]
    assert http.post("/v1/completions/render", json={"prompt": []}).status_code == 400
    usage = http.post("/v1/completions", json={"prompt": ids, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(ids)


def test_tokens_have_their_names_in_the_vocabulary(http: httpx.Client) -> None:
    asked = {"prompt": "The sea, <|im_end|>!", "return_token_strs": True}
    found = http.post("/tokenize", json=asked).json()
    assert found["token_strs"] == [
        "The", "Ġsea", ",", "Ġ<", "|", "im", "_", "end", "|", ">", "!",
    ]  # fmt: skip
    assert "token_strs" not in http.post("/tokenize", json={"prompt": "The sea"}).json()
    chats = chat("Hi") | {"return_token_strs": True, "add_special_tokens": False}
    assert http.post("/tokenize", json=chats).json()["token_strs"][0] == "<|im_start|>"


@pytest.mark.parametrize("body", [{}, {"messages": []}, chat(tools=[5]), chat(tools=[{}])])
def test_bad_bodies(http: httpx.Client, body: dict[str, Any]) -> None:
    for path in ("/render", "/tokenize", "/v1/chat/completions/render"):
        assert http.post(path, json=body).status_code == 400
