"""Tools that a model may call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from squall.errors import InvalidRequest
from squall.text.tool_formats import TOOL_NAME

MAX_SCHEMA = 100_000  # characters of a tool's parameters
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: NO_PARAMETERS)
    strict: bool = False  # a schema that cannot be enforced is an error

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(TOOL_NAME, self.name):
            raise InvalidRequest(
                f"{str(self.name)[:80]!r} is no name of a tool; use 1 to 64 letters, digits and _.-"
            )
        if not isinstance(self.description, str):
            raise self._wrong("the description must be a text")
        parameters = self.parameters
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise self._wrong('parameters must be a JSON Schema with "type": "object"')
        try:
            size = len(json.dumps(parameters))
        except (TypeError, ValueError, RecursionError) as error:
            raise self._wrong(f"parameters are no JSON: {error}") from None
        if size > MAX_SCHEMA:
            raise self._wrong(f"parameters have {size} characters; at most {MAX_SCHEMA} may be")

    @classmethod
    def of(cls, given: object, where: str = "the tool") -> Tool:
        """A tool in OpenAI's shape: an object with the type `function` and a `function`."""
        function = given.get("function") if isinstance(given, Mapping) else None
        if not isinstance(given, Mapping) or given.get("type", "function") != "function":
            raise InvalidRequest(f'{where} must be {{"type": "function", "function": {{...}}}}')
        if not isinstance(function, Mapping):
            raise InvalidRequest(f"{where}.function must be an object with a name")
        strict = function.get("strict") or False
        if not isinstance(strict, bool):
            raise InvalidRequest(f"{where}.function.strict must be true or false")
        return cls(
            name=function.get("name", ""),
            description=function.get("description") or "",
            parameters=function.get("parameters") or NO_PARAMETERS,
            strict=strict,
        )

    def shown(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}

    def schema(self) -> dict[str, Any]:
        """What a call's arguments are constrained to: the parameters, as far as they can be."""
        from squall.text.grammar import without

        schema: dict[str, Any] = {"type": "object", **self.parameters}
        while error := _unsupported(json.dumps(schema)):
            if self.strict:
                raise self._wrong(f"{error}; leave it out, or set strict to false")
            keywords = re.findall(r'"([$\w]+)"', error)
            fewer = without(schema, keywords) if keywords else schema  # it may be too deep to walk
            schema = {"type": "object"} if fewer == schema else fewer
        return schema

    def _wrong(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"tool {self.name!r}: {what}")


@lru_cache(maxsize=256)
def _unsupported(schema: str) -> str:
    """What of a schema cannot be enforced; empty if all can."""
    from squall.text.grammar import Grammar

    try:
        return Grammar("json_schema", schema).unsupported()
    except InvalidRequest as limit:
        return str(limit)
