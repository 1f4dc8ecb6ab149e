"""Sources made to crash, to take for ever, or to take all memory: refused, or done in no time."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import pytest
from drawing import Drawing

from squall.errors import InvalidRequest, SamplingFailed
from squall.text.grammar import Grammar, Grammars
from squall.text.tokenizer import Tokenizer

MOST_S = 3.0  # a second, on a machine that does other things too


def chain(count: int, rule: str, end: str) -> str:
    rules = "\n".join(rule.format(i, i + 1) for i in range(count))
    return f"start: a0\n{rules}\na{count}: {end}"


def schema(value: Any) -> Grammar:
    return Grammar.json_schema(value)


DEFS = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(3000)} | {"d3000": {}}  # fmt: skip
TWICE = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)} | {"d60": {}}
PATTERNS = [{"type": "string", "pattern": f"(a|b|c)*{'[ab]' * i}"} for i in range(40)]
NAMED = {f"d{i}": {"$anchor": f"a{i}", **PATTERNS[i]} for i in range(40)}
LINKED = {f"d{i}": {"$ref": f"#/default/d{i + 1}", **PATTERNS[i]} for i in range(39)}
SEARCHES = [f"/(?s:.*){p['pattern']}(?s:.*)/" for p in PATTERNS]
HOSTILE = {
    "groups": lambda: Grammar("regex", "(" * 2000 + "a" + ")" * 2000),
    "repeats": lambda: Grammar("regex", "a{1,1000000}"),
    "repeats of repeats": lambda: Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "backtracking": lambda: Grammar("regex", "(a+)+$"),
    "optional": lambda: Grammar("regex", "a?" * 1300 + "a" * 1300),
    "many states": lambda: Grammar("regex", "(a|b)*a(a|b){1000}"),
    "letters": lambda: Grammar("regex", "(\\w+\\s?){1,2000}"),
    "chain": lambda: Grammar("lark", chain(5000, "a{}: a{}", '"x"')),
    "long chain": lambda: Grammar("lark", chain(18_000, "a{}: a{}", '"x"')),
    "chain of terminals": lambda: Grammar("lark", chain(5000, "a{}: a{}", "A").replace("a", "A")),
    "chain of lists": lambda: Grammar("lark", chain(2000, "a{}: a{} |", 'a0 "x"')),
    "doubling": lambda: Grammar("lark", chain(60, "a{0}: a{1} a{1}", '"x"')),
    "nothing doubled": lambda: Grammar("lark", chain(2000, "a{0}: a{1} a{1} |", '"x" |')),
    "parentheses": lambda: Grammar("lark", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000),
    "left recursion": lambda: Grammar("yacc", "%%\na: a 'x' | a a | 'x' | ;"),
    "only recursion": lambda: Grammar("yacc", "%%\na: a | b; b: a;"),
    "yacc chain": lambda: Grammar("yacc", "%%" + chain(5000, "a{}: a{};", "'x';")[8:]),
    "braces": lambda: Grammar("yacc", "%%\na: 'x' " + "{" * 100_000),
    "quotes": lambda: Grammar("yacc", "%%\na: " + "'" * 100_000),
    "nested": lambda: Grammar("json_schema", '{"items":' * 25_000 + "{}" + "}" * 25_000),
    "nested lists": lambda: Grammar("json_schema", '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "levels": lambda: schema(json.loads('{"items":' * 99 + "{}" + "}" * 99)),
    "refs": lambda: schema({"$defs": DEFS, "$ref": "#/$defs/d0"}),
    "refs doubled": lambda: schema({"$defs": TWICE, "$ref": "#/$defs/d0"}),
    "ref to itself": lambda: schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "refs in a ring": lambda: schema({"$defs": {"a": {"$ref": "#/$defs/b"},
                                               "b": {"$ref": "#/$defs/a"}},
                                     "$ref": "#/$defs/a"}),
    "many of": lambda: schema({"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]}
                                         for i in range(20)]}),
    "multiple": lambda: schema({"type": "integer", "multipleOf": 1_000_003}),
    "multiples": lambda: schema({"allOf": [{"type": "integer", "multipleOf": 9973},
                                          {"multipleOf": 9967}]}),
    "decimals": lambda: schema({"type": "number", "allOf": [{"multipleOf": 1e-9},
                                                           {"multipleOf": 9967}]}),
    "huge multiple": lambda: schema({"type": "number", "multipleOf": 1e300}),
    "patterns": lambda: schema({"properties": {f"p{i}": {"pattern": "a?" * 2000 + "a" * 90}
                                              for i in range(60)}}),
    "patterns of one text": lambda: schema({"allOf": PATTERNS}),
    "patterns by anchors": lambda: schema({"allOf": [{"$ref": f"#a{i}"} for i in range(40)],
                                           "$defs": NAMED}),
    "patterns by references": lambda: schema({"$ref": "#/default/d0",
                                              "default": LINKED | {"d39": {}}}),
    "conjunction": lambda: Grammar("lark", f"start: T\nT: {' & '.join(SEARCHES)}"),
    "no disjunction": lambda: Grammar("lark", f"start: T\nT: ~(~{' | ~'.join(SEARCHES)})"),
    "names": lambda: schema({"patternProperties": {"(" * 50_000: {}}}),
    "long lists": lambda: schema({"type": "array", "minItems": 100_000}),
    "long texts": lambda: schema({"type": "string", "minLength": 10**6, "maxLength": 10**8}),
    "big enum": lambda: schema({"enum": [f"value {i}" for i in range(10_000)]}),
    "big choice": lambda: Grammar.choice([f"{i}" for i in range(20_000)]),
    "big number": lambda: Grammar("json_schema", '{"minimum": ' + "9" * 5000 + "}"),
}  # fmt: skip


@pytest.mark.serial
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, shared: Shared) -> None:
    began, error = time.monotonic(), ""
    drawing = shared.drawing
    try:
        matcher = shared.grammars.compile(HOSTILE[name]())()
        for _ in range(5):
            found = drawing.texts(matcher).nonzero()[0]
            if matcher.finished or not found.size:
                break
            matcher.accept(int(found[0]))
    except (InvalidRequest, SamplingFailed) as refused:
        error = str(refused)
    assert len(error) < 500
    assert time.monotonic() - began < MOST_S


@dataclass
class Shared:
    grammars: Grammars
    drawing: Drawing


@pytest.fixture(scope="module")
def shared(smollm: Tokenizer) -> Shared:
    found = Shared(Grammars(smollm, smollm.vocab_size), Drawing(smollm))
    found.grammars.compile(Grammar("regex", "a"))
    return found
