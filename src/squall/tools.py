"""Python functions as tools: a model calls them, and goes on until it has an answer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import PydanticUserError, TypeAdapter
from pydantic_core import to_json

from squall.api.messages import Messages, conversation
from squall.api.requests import ChatCompletionRequest
from squall.api.runner import Runner
from squall.errors import InvalidRequest
from squall.mcp import McpTools
from squall.model import Model

MOST_CALLS = 16
MOST_ERROR = 500  # characters

Function = Callable[..., Any]
# By name also with the JSON schema of the arguments, which otherwise the signature tells.
Named = Mapping[str, Function | tuple[Mapping[str, Any], Function]]
Functions = Iterable[Function | McpTools] | Named


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer, why it ended, and the conversation up to it, with all calls and results."""

    answer: str
    finish_reason: str | None
    messages: list[dict[str, Any]]


def run(
    model: Model | Runner,
    messages: Messages,
    functions: Functions,
    *,
    most_calls: int = MOST_CALLS,
    **options: Any,
) -> Outcome:
    """Answer a chat, calling functions as the model asks for.

    functions: the model is told their signatures and docstrings, and what goes wrong in them;
        tools of MCP servers may be among them.
    most_calls: after so many the model has to answer without.
    options: other fields of a ChatCompletionRequest; `tool_choice` is for the first answer.
    """
    runner = model if isinstance(model, Runner) else Runner(model)
    known = _known(functions)
    tools = [{"type": "function", "function": told} for told, _ in known.values()]
    said = conversation(messages)
    while True:
        options |= {"tool_choice": "none"} if most_calls <= 0 else {}
        request = ChatCompletionRequest(messages=said, tools=tools, **options)
        choice = runner.send_chat_completion_request(request).choices[0]
        said.append(choice.message.to_dict())
        if choice.finish_reason != "tool_calls":
            return Outcome(choice.message.content or "", choice.finish_reason, said)
        for call in choice.message.tool_calls:
            result = _result(known[call.function.name][1], call.function.arguments)
            said.append({"role": "tool", "tool_call_id": call.id, "content": result})
        most_calls -= len(choice.message.tool_calls)
        options.pop("tool_choice", None)


def _known(functions: Functions) -> dict[str, tuple[dict[str, Any], Callable[[str], Any]]]:
    """By name what the model is told, and what calls it with arguments as JSON."""
    if isinstance(functions, Mapping):
        return {name: _tool(name, given) for name, given in functions.items()}
    found: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {}
    for each in functions:
        if isinstance(each, McpTools):
            told = (tool["function"] for tool in each.tools)
            found |= {one["name"]: (one, partial(each.call, one["name"])) for one in told}
        else:
            found[each.__name__] = _tool(each.__name__, each)
    return found


def _tool(name: str, given: Any) -> tuple[dict[str, Any], Callable[[str], Any]]:
    schema, function = given if isinstance(given, tuple) else (None, given)
    if inspect.iscoroutinefunction(function):
        raise InvalidRequest(f"{name} is async; give a function that has its result when it ends")
    told = {"name": name, "description": inspect.getdoc(function) or ""}
    if schema is not None:
        return told | {"parameters": schema}, lambda text: function(**json.loads(text))
    try:
        adapter = TypeAdapter(function)
        return told | {"parameters": adapter.json_schema()}, adapter.validate_json
    except PydanticUserError as error:
        text = f"the signature of {name} has no JSON schema; give (schema, function): {error}"
        raise InvalidRequest(text) from None


def _result(function: Callable[[str], Any], arguments: str) -> str:
    try:
        result = function(arguments)
        text = result if isinstance(result, str) else to_json(result, fallback=str).decode()
        return text.encode(errors="replace").decode()  # names of files may be no Unicode
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:MOST_ERROR]
