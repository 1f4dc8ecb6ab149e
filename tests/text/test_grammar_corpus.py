"""Answers drawn at random from 200 JSON schemas, regexes and choices are what was asked for."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from drawing import Drawing
from schema_corpus import FUNCTIONS, SCHEMAS

from squall.text.grammar import Grammar, Grammars
from squall.text.tokenizer import Tokenizer

REGEXES = (
    "abc", "a|b|ab|abc", "[0-9]+", "\\d{3}-\\d{4}", "[A-Z][a-z]{1,8}", "(foo|bar)*baz?", "a{2,4}b+",
    "\\w+@\\w+\\.(com|org)", "[^a-z\\n]{1,5}", "(?i:yes|no)", ".{3}", "\\s*x\\s*", "(ab)*",
    "(a+)+", "(a|a)*b", "a*?b", "\\+?[0-9 ()-]{5,12}", "[\\u00e9è]+", "日本+", "(?:(?:a|b)c){2}",
    "#[0-9a-fA-F]{6}", "\\d{4}-(0[1-9]|1[0-2])-([0-2]\\d|3[01])", "\"[^\"]*\"", "/usr(/[a-z]+)+/?",
    "\\\\n", "a\\.b\\*c", "[\\]\\[]+", "(x(y(z)?)?)?w", "a{0,3}", "[\\w.-]+",
    "\\t\\n?", "a{1,1000000}", "[a-cx-z&&[^b]]", "-?\\d+(\\.\\d+)?", "^abc$", "(?P<name>a)b",
    "(?s:.{2})", "\\x41\\u0042",
)  # fmt: skip


@pytest.fixture(scope="module")
def grammars(smollm: Tokenizer) -> Grammars:
    return Grammars(smollm, smollm.vocab_size)


@pytest.fixture(scope="module")
def drawing(smollm: Tokenizer) -> Drawing:
    return Drawing(smollm)


def valid(text: bytes, schema: dict[str, Any]) -> None:
    checker = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    checker(schema, format_checker=checker.FORMAT_CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("index", range(len(SCHEMAS)))
def test_answers_fit_the_schema(index: int, grammars: Grammars, drawing: Drawing) -> None:
    """Also those that were cut: they can be gone on with to what fits."""
    start = grammars.compile(Grammar.json_schema(SCHEMAS[index]))
    for tokens in (5, 40):
        text = drawing.answer(start, tokens)
        valid(text, SCHEMAS[index])


@pytest.mark.parametrize("regex", REGEXES)
def test_answers_match_the_regex(regex: str, grammars: Grammars, drawing: Drawing) -> None:
    start = grammars.compile(Grammar("regex", regex))
    pattern = "[acx-z]" if "&&" in regex else regex
    for _ in range(5):
        text = drawing.answer(start, 20)
        assert re.fullmatch(pattern, text.decode()), text


def test_any_object(grammars: Grammars, drawing: Drawing) -> None:
    start = grammars.compile(Grammar("json_object"))
    for _ in range(20):
        assert isinstance(json.loads(drawing.answer(start, 20)), dict)


def test_a_choice(grammars: Grammars, drawing: Drawing) -> None:
    texts = ["yes", "yes and no", "no", "yes", '"q"\n\\', "日本語", "no way", " "]
    start = grammars.compile(Grammar.choice(texts))
    found = {drawing.answer(start).decode() for _ in range(200)}
    assert found == set(texts)


def test_descriptions_change_nothing(grammars: Grammars, drawing: Drawing) -> None:
    """What descriptions hold has made engines crash."""
    words = ["<tool_call>", "\\", '"', "{{", "%json {", "/re/", "\u2028", "\0", "//", "x-guidance"]
    words += ["$ref", "日本", "[suffix=", "%ignore", "<|im_end|>", "'", "`", "\n\n", "é"]
    for _ in range(1000):
        function = json.loads(json.dumps(drawing.random.choice(FUNCTIONS)))
        for node in (function, *function["properties"].values()):
            node["description"] = "".join(drawing.random.choices(words, k=5))
        start = grammars.compile(Grammar.json_schema(function))
    valid(drawing.answer(start, 30), function)
