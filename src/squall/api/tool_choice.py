"""Which tools an answer may call, or must: what OpenAI's fields, and mistral.rs's, say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from squall.api.messages import check_short
from squall.api.structure import naming
from squall.engine.fields import check, shown
from squall.errors import InvalidRequest
from squall.text.tools import Tool

MOST_TOOLS = 128
ToolChoice = Enum("ToolChoice", "NoTools Auto Required")
_MODES: Mapping[Any, str] = {
    ToolChoice.NoTools: "none", ToolChoice.Auto: "auto", ToolChoice.Required: "required",
    None: "auto", "none": "none", "auto": "auto", "required": "required",
}  # fmt: skip


class Offer(NamedTuple):
    """The tools that the model is shown, and of these what it may call, or with `required` must."""

    tools: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    required: bool = False
    parallel: bool = True


def offer(tools: Any, schemas: Any, choice: Any, parallel: bool | None = None) -> Offer:
    """What the fields `tools` or `tool_schemas`, `tool_choice` and so on come to."""
    if tools and schemas:
        raise InvalidRequest("tools and tool_schemas say the same; give one of them")
    known = _known("tool_schemas", schemas) if schemas else _known("tools", tools or ())
    mode, named = _chosen(choice)
    missing = [name for name in named or () if name not in known]
    if missing or (mode == "required" and not known):
        have = ", ".join(known) or "none"
        raise InvalidRequest(f"tool_choice is {shown(choice)}; it must be among tools: {have}")
    if mode == "none" or not known:
        return Offer()
    may = tuple(known[name] for name in dict.fromkeys(named or known))
    if parallel is None:  # who names one function wants one call
        parallel = not (mode == "required" and named and len(may) == 1)
    return Offer(tuple(known.values()), may, mode == "required", parallel)


def _known(field: str, given: Any) -> dict[str, Tool]:
    """Tools by name, from objects, or as mistral.rs has them from JSON."""
    check(isinstance(given, list | tuple), field, given, "a list of tools")
    check_short(field, given, MOST_TOOLS)
    found: dict[str, Tool] = {}
    for i, item in enumerate(given):
        with naming(f"{field}[{i}]"):
            try:
                made = json.loads(item) if isinstance(item, str) else item
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"it is no JSON: {error}") from None
            tool = Tool.of(made)
            if tool.name in found:
                raise InvalidRequest(f"another one is named {tool.name!r}, too")
        found[tool.name] = tool
    return found


def _chosen(choice: Any) -> tuple[str, list[str] | None]:
    """The mode, and the names of the tools if it is about some."""
    try:
        if not isinstance(choice, Mapping):
            return _MODES[choice], None
        kind = choice["type"]
        # OpenAI's chats have an object within the object, its responses do not.
        about = choice.get(kind, choice)
        if kind == "function":
            return "required", [str(about["name"])]
        if kind == "allowed_tools":
            names = [str(tool.get("function", tool)["name"]) for tool in about["tools"]]
            return _MODES[about.get("mode", "auto")], names
        return _MODES[kind], None
    except (KeyError, TypeError, AttributeError):
        allowed = "none, auto, required, a function of tools, or allowed_tools"
        raise InvalidRequest(f"tool_choice is {shown(choice)}; it must be {allowed}") from None
