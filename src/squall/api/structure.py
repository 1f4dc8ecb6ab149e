"""The shape that an answer is to have: what OpenAI, mistral.rs and vLLM call it, as one Grammar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from squall.engine.fields import check, shown
from squall.errors import InvalidRequest
from squall.text.grammar import Grammar

# vLLM's names of kinds; it has hints, too.
_VLLM = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}


class Structure(NamedTuple):
    """A grammar, and the field that asked for it."""

    field: str
    grammar: Grammar


@dataclass(frozen=True, kw_only=True)
class StructureFields:
    """What shape the answer has; at most one may be given.

    response_format: OpenAI's object; in Python a pydantic class or a JSON schema are as good.
    grammar: a text of the kind `grammar_type`, or an object of `type` and `value`, or a Grammar.
    structured_outputs: vLLM's object, whose parts are the `guided_` ones, too.
    """

    response_format: Any = None
    json_schema: Any = None
    grammar: Any = None
    grammar_type: str | None = None
    structured_outputs: Mapping[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def structure(self) -> Structure | None:
        """The grammar that comes of it; raises InvalidRequest naming the field that is wrong."""
        given = {name: getattr(self, name) for name in _READ}
        if self.grammar_type is not None:
            if not isinstance(self.grammar, str):
                raise InvalidRequest("grammar_type needs a grammar that is a text; give one")
            given["grammar"] = {"type": self.grammar_type, "value": self.grammar}
        found = []
        for name, value in given.items():
            with naming(name):
                grammar = None if value is None else _READ[name](value)
            found += [] if grammar is None else [Structure(name, grammar)]
        if len(found) > 1:
            first, second = found[0].field, found[1].field
            raise InvalidRequest(f"{first} must not be given with {second}; give one of them")
        return found[0] if found else None


@contextmanager
def naming(field: str) -> Iterator[None]:
    """What is wrong is so with this field."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{field} is not usable: {error}") from None


def _made(kind: Any, value: Any) -> Grammar:
    if kind == "json_schema":
        return Grammar.json_schema(value)
    check(isinstance(kind, str), "its type", kind, "a text")
    return Grammar.choice(value) if isinstance(value, list) else Grammar(kind, value)


def _response_format(value: Any) -> Grammar | None:
    if not isinstance(value, Mapping) or value.get("type") == "object":
        return Grammar.json_schema(value)
    kind = value.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidRequest(f"its type is {shown(kind)}; known: text, json_object, json_schema")
    # OpenAI's chats have an object around the schema, its responses do not.
    about = value.get("json_schema", value)
    schema = about.get("schema") if isinstance(about, Mapping) else None
    if schema is None and kind == "json_schema":
        raise InvalidRequest("its json_schema has no schema; give one")
    if kind == "text":
        return None
    return Grammar("json_object") if schema is None else Grammar.json_schema(schema)


def _grammar(value: Any) -> Grammar:
    if isinstance(value, Grammar):
        return value
    if isinstance(value, str):
        raise InvalidRequest("it needs a grammar_type; give one, such as regex or lark")
    if isinstance(value, Mapping) and value.keys() == {"type", "value"}:
        return _made(value["type"], value["value"])
    return Grammar.json_schema(value)


def _structured_outputs(value: Any) -> Grammar | None:
    check(isinstance(value, Mapping), "it", value, "an object")
    hints = [name for name in value if str(name).startswith("disable_")]
    said = {k: v for k, v in value.items() if v not in (None, False) and k not in hints}
    if not said:
        return None
    (name, part), *others = said.items()
    if others or name not in (*_VLLM, "json_object"):
        known = ", ".join(_VLLM)
        raise InvalidRequest(f"it has {', '.join(map(shown, said))}; give one of {known}")
    return _made(_VLLM[name], part) if name in _VLLM else Grammar("json_object")


_READ: Mapping[str, Callable[[Any], Grammar | None]] = {
    "response_format": _response_format,
    "json_schema": Grammar.json_schema,
    "grammar": _grammar,
    "structured_outputs": _structured_outputs,
    **{f"guided_{name}": partial(_made, kind) for name, kind in _VLLM.items()},
}
