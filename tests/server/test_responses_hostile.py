"""Bodies for agents' endpoints with one part after the other replaced: errors, and never a 5xx."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

STRANGE: list[Any] = [None, 5, -1.5, True, "x", [], {}, [5], ["x"], {"type": 5}, {"type": "text"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
RESPONSE = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "H"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "2"}]},
        {"role": "user", "content": "And?"},
    ],
    "instructions": "Be kind.",
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": False}],
    "tool_choice": {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "f"}],
    },
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low"},
    "metadata": {"a": "b"},
    "max_output_tokens": 1,
}
MESSAGE = {
    "system": [{"type": "text", "text": "Be kind."}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "H", "signature": ""},
                {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "2"}]},
    ],
    "tools": [{"name": "f", "description": "F.", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "disabled"},
    "output_config": {"effort": "low"},
    "stop_sequences": ["x"],
    "max_tokens": 1,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in a body."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def replaced(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The body with each part left out, and by turns replaced by something strange."""
    for number, path in enumerate(places(body)):
        for strange in (STRANGE[number % len(STRANGE)], STRANGE[(3 * number + 1) % len(STRANGE)]):
            found: Any = copy.deepcopy(body)
            inner = found
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = strange
            yield found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", RESPONSE),
        ("/v1/messages", MESSAGE),
        ("/v1/messages/count_tokens", MESSAGE),
    ],
)
def test_row_4_one_part_is_strange(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert http.post(path, json=body).status_code == 200
    seen = set()
    for strange in replaced(body):
        response = http.post(path, json=strange | {"max_tokens": 1, "max_output_tokens": 1})
        assert response.status_code in (200, 400, 404), (strange, response.text)
        assert response.status_code == 200 or response.json()["error"]["message"]
        seen.add(response.status_code)
    assert seen >= {200, 400}
