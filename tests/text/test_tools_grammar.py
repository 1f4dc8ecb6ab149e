"""Grammars of calls: whatever a model draws from what they allow is valid calls, and whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from squall.errors import InvalidRequest, SamplingFailed
from squall.text.answer import AnswerParser, CallArguments, CallBegun, CallEnded, Said
from squall.text.grammar import Grammars
from squall.text.reasoning import Reasoning
from squall.text.tokenizer import Tokenizer
from squall.text.tool_formats import FORMATS, ToolFormat
from squall.text.tools import Tool

FUNCTIONS: list[dict[str, Any]] = [
    {"name": "now", "parameters": None},
    {
        "name": "calculate_triangle_area",
        "description": 'Area of a triangle. "%json" */ // # \\ \n | start: /x/ ' + "ü" * 40,
        "parameters": {
            "type": "object",
            "properties": {
                "base": {"type": "integer", "description": "The base."},
                "height": {"type": "number", "minimum": 0, "maximum": 1000},
                "unit": {"type": "string", "enum": ["cm", 'in"ch', "m²"], "default": "cm"},
            },
            "required": ["base", "height"],
        },
    },
    {
        "name": "calculate.mortgage-2",
        "parameters": {
            "type": "object",
            "properties": {
                "rates": {
                    "type": "array",
                    "items": {"type": "number"},
                    "minItems": 1,
                    "maxItems": 3,
                },
                "who": {"$ref": "#/$defs/person"},
                "fixed": {"type": ["boolean", "null"]},
            },
            "required": ["who", "rates"],
            "additionalProperties": False,
            "$defs": {
                "person": {
                    "type": "object",
                    "properties": {
                        "名前": {"type": "string", "maxLength": 8},
                        "age": {"type": "integer"},
                    },
                    "required": ["名前"],
                    "additionalProperties": False,
                }
            },
        },
    },
    {
        "name": "route",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "to": {"anyOf": [{"type": "string", "pattern": "^[A-Z]{3}$"}, {"type": "null"}]},
                "mode": {"const": "fast"},
            },
            "required": ["to", "mode"],
            "additionalProperties": False,
        },
    },
    {  # what cannot be enforced: arguments are any object
        "name": "unusual",
        "parameters": {"type": "object", "propertyNames": {"pattern": "^a"}},
    },
]
TOOLS = tuple(Tool.of({"type": "function", "function": function}) for function in FUNCTIONS)
named = pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)


class Vocabulary:
    """The tokens of a real model, whose control tokens may have other names."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str] = ()) -> None:
        names = list(dict.fromkeys(names))
        self.tokenizer = tokenizer
        count = tokenizer.vocab_size
        special = [token for token in range(count) if tokenizer.is_special(token)]
        self.tokens = [tokenizer.token_bytes(token) for token in range(count)]
        self.controls = dict(zip(names, special[3:], strict=False))
        self.names = {token: name for name, token in self.controls.items()}
        self.special_token_ids = special
        self.bos_token_id = None
        self.eos_token_id = tokenizer.eos
        self.count = count
        structure = set('{}[]",: 0123456789')
        self.structure = np.zeros(count, bool)
        for token, text in enumerate(self.tokens):
            self.structure[token] = set(text.decode("utf-8", "replace")) <= structure
        self.of_llguidance = LLTokenizer(TokenizerWrapper(self))

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer.encode(text.decode("utf-8", "replace"), add_bos=False)

    def text(self, token: int) -> bytes:
        return self.names[token].encode() if token in self.names else self.tokens[token]


@pytest.fixture(scope="session")
def vocabulary(smollm: Tokenizer) -> Callable[[Sequence[str]], Vocabulary]:
    made: dict[tuple[str, ...], Vocabulary] = {}

    def of(names: Sequence[str]) -> Vocabulary:
        if tuple(names) not in made:
            made[tuple(names)] = Vocabulary(smollm, names)
        return made[tuple(names)]

    return of


def lark(row: ToolFormat, tools: Sequence[Tool], **given: Any) -> str:
    return row.grammar(tools, **given).lark


def bound(row: ToolFormat, vocabulary: Vocabulary) -> ToolFormat:
    """The row in a vocabulary where all its marks are control tokens."""
    return replace(row, controls=vocabulary.controls)


def draw(
    source: str, vocabulary: Vocabulary, random_: random.Random, begin: str = "", most: int = 400
) -> tuple[str, bool]:
    """An answer of tokens drawn from what the grammar allows, and whether it ended.

    What ends strings, numbers and lists is drawn more often than chance would.
    """
    matcher = LLMatcher(vocabulary.of_llguidance, LLMatcher.grammar_from_lark(source))
    assert not matcher.is_error(), matcher.get_error()
    made = b""
    for token in cut(begin, vocabulary, random_):
        assert matcher.consume_token(token), matcher.get_error()
        made += vocabulary.text(token)
    for _ in range(most):
        if matcher.is_stopped():
            break
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: vocabulary.count].astype(bool)
        if allowed[vocabulary.eos_token_id] and random_.random() < 0.5:
            break
        structural = allowed & vocabulary.structure
        among = structural if structural.any() and random_.random() < 0.8 else allowed
        token = int(random_.choice(np.flatnonzero(among)))
        if token == vocabulary.eos_token_id:
            break
        assert matcher.consume_token(token), matcher.get_error()
        made += vocabulary.text(token)
    assert not matcher.is_error(), matcher.get_error()
    return made.decode("utf-8", "replace"), matcher.is_accepting()


def cut(text: str, vocabulary: Vocabulary, random_: random.Random) -> list[int]:
    """Tokens of a text, cut at random places first, so that marks lie in and across tokens."""
    if text in vocabulary.controls:
        return [vocabulary.controls[text]]
    at = random_.randrange(len(text) + 1)
    return [*vocabulary(text[:at].encode()), *vocabulary(text[at:].encode())] if text else []


def check(text: str, row: ToolFormat, *, ended: bool) -> list[str]:
    """The names that are called; all of it must be calls whose arguments fit their schemas."""
    parser = AnswerParser(tools=row, names=[tool.name for tool in TOOLS])
    events = parser.push(text, final=True)
    names = [event.name for event in events if isinstance(event, CallBegun)]
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] += event.text
    whole = [event.index for event in events if isinstance(event, CallEnded)]
    assert len(whole) == len(names) if ended else len(whole) >= len(names) - 1
    for index in whole:
        tool = next(tool for tool in TOOLS if tool.name == names[index])
        schema = {"type": "object"} if tool.name == "unusual" else tool.parameters
        jsonschema.validate(json.loads(arguments[index]), schema)
    return names


controls = pytest.mark.parametrize("controls", [False, True], ids=["text", "controls"])
Vocabularies = Callable[[Sequence[str]], Vocabulary]


@pytest.fixture
def random_(rng: np.random.Generator) -> random.Random:
    return random.Random(int(rng.integers(1 << 60)))


def said(text: str, row: ToolFormat) -> str:
    events = AnswerParser(tools=row).push(text, final=True)
    return "".join(event.text for event in events if isinstance(event, Said))


@named
@controls
def test_row_7_a_call_that_must_come_is_valid(
    row: ToolFormat, controls: bool, vocabulary: Vocabularies, random_: random.Random
) -> None:
    words = vocabulary(row.marks() if controls else ())
    row = bound(row, words)
    source = lark(row, TOOLS, required=True, parallel=True)
    drawn = ends = 0
    while drawn < 4 or not ends:  # some are cut
        text, ended = draw(source, words, random_)
        assert check(text, row, ended=ended)
        assert not ended or said(text, row) == ""
        drawn, ends = drawn + 1, ends + ended


@named
@controls
def test_row_7_a_call_that_has_begun_becomes_valid(
    row: ToolFormat, controls: bool, vocabulary: Vocabularies, random_: random.Random
) -> None:
    words = vocabulary(row.marks() if controls else ())
    row = bound(row, words)
    source = lark(row, TOOLS, required=False, parallel=True)
    opening = row.opening if row.opening in row.controls else row.opening + row.leads[0]
    text, ended = draw(source, words, random_, begin=opening)
    assert check(text, row, ended=ended)
    begin = "" if controls else "I look. " + opening
    text, ended = draw(source, words, random_, begin=begin)
    names = check(text, row, ended=ended)
    assert names or controls


@named
def test_an_answer_may_do_without_calls(row: ToolFormat, vocabulary: Vocabularies) -> None:
    words = vocabulary(row.marks())
    row = bound(row, words)
    source = lark(row, TOOLS, required=False, parallel=True)
    for text in ('{"name": "Bob", "parameters": 3, "age": 4}', "[1]", "<tool_", "Ü\n\n{}", "A: B"):
        matcher = LLMatcher(words.of_llguidance, LLMatcher.grammar_from_lark(source))
        assert all(map(matcher.consume_token, words(text.encode())))
        assert matcher.is_accepting()
        assert said(text, row) == text
    assert "<[" in source or not row.controls


@named
def test_one_call_where_several_are_not_wanted(
    row: ToolFormat, vocabulary: Vocabularies, random_: random.Random
) -> None:
    words = vocabulary(row.marks())
    row = bound(row, words)
    source = lark(row, TOOLS[3:4], required=True, parallel=False)
    for _ in range(3):
        text, ended = draw(source, words, random_)
        assert ended
        assert check(text, row, ended=True) == ["route"]


@named
def test_an_answer_that_begins_like_a_bare_call_is_held_to_the_schema(
    row: ToolFormat, vocabulary: Vocabularies, random_: random.Random
) -> None:
    words = vocabulary(row.marks())
    row = bound(row, words)
    source = lark(row, TOOLS, required=False, parallel=True)
    for begin in ('{"name": "route", "parameters":', '{ "name" :"route" ,\n"parameters" : '):
        text, ended = draw(source, words, random_, begin=begin)
        assert ended
        assert check(text, row, ended=True) == ["route"]


def test_the_trigger_lies_in_tokens_and_across_them(vocabulary: Vocabularies) -> None:
    words = vocabulary(())
    row = next(row for row in FORMATS if row.name == "hermes")
    source = lark(row, TOOLS[:1], required=False, parallel=True)
    call = 'A<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for at in range(len(call) + 1):
        for wrong in ("", "!"):
            matcher = LLMatcher(words.of_llguidance, LLMatcher.grammar_from_lark(source))
            tokens = words(call[:at].encode()) + words((wrong + call[at:]).encode())
            fits = all(map(matcher.consume_token, tokens))
            assert fits is (not wrong or at < len("A<tool_call>"))


def test_a_schema_of_many_references_is_enforced() -> None:
    """Of so many levels that they need much of a stack."""
    definitions = {
        f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1500)
    }
    properties = {"a": {"$ref": "#/$defs/d0"}}
    schema = {"properties": properties, "$defs": definitions | {"d1500": {}}}
    assert Tool("f", parameters=schema).schema()["properties"] == properties


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"properties": {"a": {"type": "bogus"}}}, "bogus"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}, "look-around"),
    ],
)
def test_a_strict_schema_that_cannot_be_enforced_is_refused(
    schema: dict[str, Any], keyword: str
) -> None:
    with pytest.raises(InvalidRequest, match=keyword):
        lark(FORMATS[0], [Tool("f", parameters=schema, strict=True)], required=True, parallel=True)
    lark(FORMATS[0], [Tool("f", parameters=schema)], required=True, parallel=True)


def test_without_strict_the_rest_of_a_schema_holds() -> None:
    items = {"type": "array", "items": {"type": "integer"}, "maxItems": 3}
    properties = {"a": {**items, "uniqueItems": True, "contains": {}}, "not": {"type": "null"}}
    schema = {"type": "object", "properties": properties, "required": ["a"]}
    wanted = schema | {"properties": {"a": items, "not": {"type": "null"}}}
    assert Tool("f", parameters=schema).schema() == wanted
    assert properties["a"]["uniqueItems"]
    assert Tool("f", parameters={"properties": {"a": {"type": "objet"}}}).schema() == ANY


ANY = {"type": "object"}


def test_row_7_random_schemas_whatever_their_descriptions_say(
    vocabulary: Vocabularies, random_: random.Random, nightly: bool
) -> None:
    words = vocabulary(())
    row = next(row for row in FORMATS if row.name == "hermes")
    for n in range(1000 if nightly else 40):
        parameters = {
            "type": "object",
            "properties": {f"p{i}": schema(random_, 2) for i in range(random_.randrange(4))},
        }
        parameters["required"] = [p for p in parameters["properties"] if random_.random() < 0.7]
        tool = Tool(f"f{n}", description=words_of(random_), parameters=parameters, strict=True)
        source = lark(row, [tool], required=True, parallel=False)
        text, ended = draw(source, words, random_)
        events = AnswerParser(tools=row).push(text, final=True)
        arguments = "".join(e.text for e in events if isinstance(e, CallArguments))
        if ended:
            jsonschema.validate(json.loads(arguments), parameters)


def words_of(random_: random.Random) -> str:
    parts = [
        '"',
        "\\",
        "\n",
        "%json {",
        "/*",
        "//",
        "|",
        "<[1]>",
        "start: ",
        "é",
        "雨",
        "{",
        "#",
        "'",
    ]
    return "".join(random_.choices(parts, k=random_.randrange(12)))


def schema(random_: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": 12},
        lambda: {"type": "integer", "minimum": -5, "maximum": random_.randrange(100)},
        lambda: {"type": "number"},
        lambda: {"type": ["boolean", "null"]},
        lambda: {"enum": ["a", 1, None, words_of(random_)]},
        lambda: {"type": "array", "items": schema(random_, depth - 1), "maxItems": 2},
        lambda: {"anyOf": [schema(random_, depth - 1), {"type": "null"}]},
        lambda: {"type": "object", "properties": {'é"': schema(random_, depth - 1)}},
    ]
    made = random_.choice(kinds if depth else kinds[:5])()
    return {**made, "description": words_of(random_)}


THINK = Reasoning("<think>", "</think>")
CALL = FORMATS[-1].text([("now", "{}")])


@pytest.fixture(scope="module")
def grammars(smollm: Tokenizer) -> Grammars:
    return Grammars(smollm, smollm.vocab_size)


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    ("text", "right"),
    [
        (CALL, True),
        (f"<think>so {CALL} or\n</think>\n\n{CALL}", True),
        (f"<think>{CALL}", False),
        (f"<think>a</think>{CALL} b", False),
        ("Yes.", None),
        ("<think>a</think>Yes.", None),
    ],
)
def test_row_8_calls_come_after_the_reasoning_if_there_is_some(
    text: str, right: bool | None, required: bool, grammars: Grammars, smollm: Tokenizer
) -> None:
    """Marks in it are none; without it they count from the beginning."""
    calls = FORMATS[-1].grammar(TOOLS, required=required, parallel=True, reasoning=THINK)
    matcher = grammars.compile(calls, after=THINK)()
    fits = True
    try:
        for token in smollm.encode(text, add_bos=False):
            matcher.accept(token)
        row = matcher.allowed(())[0]
        fits = any(row[stop // 32] >> (stop % 32) & 1 for stop in smollm.stop_ids)
    except SamplingFailed:
        fits = False
    assert fits is (not required if right is None else right)
