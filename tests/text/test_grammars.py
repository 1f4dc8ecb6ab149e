"""Grammars: what is refused and how, and what matchers promise to the engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pydantic
import pytest
from drawing import Drawing

from squall.errors import InvalidRequest, SamplingFailed
from squall.text.grammar import MAX_DIGITS, Grammar, Grammars, Matcher
from squall.text.reasoning import Reasoning
from squall.text.tokenizer import Tokenizer

AB = Grammar("regex", "ab+")
NAME = Grammar.json_schema(
    {"type": "object", "properties": {"temperature_unit": {"enum": ["c", "f"]}},
     "required": ["temperature_unit"]}
)  # fmt: skip


@pytest.fixture(scope="module")
def grammars(smollm: Tokenizer) -> Grammars:
    return Grammars(smollm, smollm.vocab_size + 40)


@pytest.fixture(scope="module")
def drawing(smollm: Tokenizer) -> Drawing:
    return Drawing(smollm)


def allows(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token // 32] >> (token % 32) & 1)


def fed(matcher: Matcher, tokenizer: Tokenizer, text: str) -> Matcher:
    for token in tokenizer.encode(text, add_bos=False):
        assert allows(matcher.allowed(())[0], token), tokenizer.token_bytes(token)
        matcher.accept(token)
    return matcher


@pytest.mark.parametrize(
    ("kind", "value", "named"),
    [
        ("bnf", "x", "known: regex, yacc"),
        ("regex", "", "not be empty|not empty"),
        ("regex", 3, "must be a text"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(a)\\1", "backreferences"),
        ("regex", "a(", "unclosed group"),
        ("regex", "a" * 5000, "5000 bytes; the limit is 4096"),
        ("lark", "x" * 300_000, "300000 bytes; the limit is 262144"),
        ("lark", "start: foo", "foo"),
        ("lark", "%import .secret.FILE\nstart: FILE", "secret"),
        ("lark", "start: %json [", "%json"),
        ("lark", 'start: %json {"not": {}}', '"not"'),
        ("lark", 'start: %json {"not": {}, "x-guidance": {"lenient": true}}', '"not"'),
        ("choice", "[]", "at least one text"),
        ("choice", '["a", ""]', "none may be empty"),
        ("choice", '"a"', "must be a list"),
        ("json_schema", "[", "not JSON"),
        ("json_schema", "1, 2", "not JSON"),
        ("json_schema", '{}, "x": {}', "not one JSON text"),
        ("json_schema", "3", "must be an object"),
        ("json_schema", "false", "must be an object, or true"),
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"a": 1, "a": 2}', "appears twice"),
        ("json_schema", '{"$ref": "#"}', "no answer fits"),
        ("json_schema", '{"$ref": "file:///etc/passwd"}', "etc/passwd"),
        ("json_schema", '{"$ref": "https://example.com/s"}', "example.com"),
        ("json_schema", '{"type": "string", "format": "iri"}', "iri"),
        ("json_schema", '{"type": "string", "pattern": "(?!a)"}', "look-around"),
        ("json_schema", '{"allOf": [{"type": "null"}, {"type": "string"}]}', "Unsatisfiable"),
        ("yacc", "a: b;", "after a line with %%"),
        ("yacc", "%%\na: b;", "line 2: 'b' has no rule"),
        ("yacc", "%%\na: a;", "no answer fits"),
    ],
)
def test_refused(kind: Any, value: Any, named: str, grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest, match=named) as error:
        grammars.compile(Grammar(kind, value))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "keyword",
    ["not", "if", "then", "else", "contains", "minContains", "propertyNames", "dependencies",
     "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties",
     "uniqueItems", "$dynamicRef"],
)  # fmt: skip
def test_a_keyword_that_cannot_be_enforced_is_named(keyword: str, grammars: Grammars) -> None:
    for schema in (
        {keyword: True},
        {"type": "object", "properties": {"a": {"items": {keyword: {}}}}},
        {"x-guidance": {"lenient": True}, keyword: {}},
    ):
        with pytest.raises(InvalidRequest, match=f'not supported: "{keyword.replace("$", ".")}"'):
            grammars.compile(Grammar.json_schema(schema))


@pytest.mark.parametrize("name", ["password", "binary", "path", "ipv4network", "phone", "int32"])
def test_formats_that_the_standard_lacks_say_nothing(name: str, grammars: Grammars) -> None:
    """As of pydantic's SecretStr, bytes and Path, and in schemas of OpenAPI."""
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": name}}}
    grammars.compile(Grammar.json_schema(schema))


@pytest.mark.parametrize("names", ["properties", "patternProperties"])
def test_a_name_is_known_however_it_is_written(names: str, smollm: Tokenizer) -> None:
    schema = {"type": "object", names: {"a": {"type": "integer"}},
              "additionalProperties": {"type": "null"}}  # fmt: skip
    matcher = Grammars(smollm, smollm.vocab_size).compile(Grammar.json_schema(schema))()
    *before, escape = smollm.encode('{"\\u', add_bos=False)
    for token in before:
        matcher.accept(token)
    assert not matcher.allowed(())[0][escape // 32] >> (escape % 32) & 1  # as in "\u0061"


def test_from_python() -> None:
    class Person(pydantic.BaseModel):
        name: str

    made = json.loads(Grammar.json_schema(Person).value)
    assert made["required"] == ["name"]
    assert Grammar.json_schema('{"a": 1}').value == '{"a": 1}'
    for wrong in ({"a": {1}}, {"a": float("nan")}, object()):
        with pytest.raises(InvalidRequest, match="not JSON"):
            Grammar.json_schema(wrong)  # type: ignore[arg-type]
    for made, kind in ((list[int], "array"), (dict[str, Person], "object"), (int, "integer")):
        assert json.loads(Grammar.json_schema(made).value)["type"] == kind
    for wrong in (Grammars, list[Grammars], Callable[[int], int]):
        with pytest.raises(InvalidRequest, match="has no JSON schema"):
            Grammar.json_schema(wrong)  # type: ignore[arg-type]


def test_importing_stays_light() -> None:
    code = "import sys, squall.text.grammar; print('llguidance' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_row_9_a_grammar_is_compiled_once(
    smollm: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many threads ask for it; what failed is no obstacle."""
    grammars = Grammars(smollm, smollm.vocab_size)
    with pytest.raises(InvalidRequest):
        grammars.compile(Grammar("regex", "(?=a)"))
    compiled = []
    compile_ = Grammars._compile

    def counted(self: Grammars, grammar: Grammar, *after: Any) -> Any:
        compiled.append(grammar)
        return compile_(self, grammar, *after)

    monkeypatch.setattr(Grammars, "_compile", counted)
    threads = [threading.Thread(target=grammars.compile, args=(AB,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled == [AB]


def test_few_are_kept(smollm: Tokenizer) -> None:
    grammars = Grammars(smollm, smollm.vocab_size)
    starts = [grammars.compile(Grammar("regex", f"a{{{i}}}")) for i in range(1, 200)]
    assert grammars.compile(Grammar("regex", "a{199}")) is starts[-1]
    assert grammars.compile(Grammar("regex", "a{1}")) is not starts[0]


def test_only_texts_and_ends(grammars: Grammars, smollm: Tokenizer) -> None:
    """No control token by its name, no id that the tokenizer lacks; where it may end, all ends."""
    matcher = grammars.compile(Grammar("regex", "(?s:.*)"))()
    mask = matcher.allowed(())[0]
    assert mask.shape == ((smollm.vocab_size + 40 + 31) // 32,)
    special = [i for i in range(smollm.vocab_size) if smollm.is_special(i)]
    assert {i for i in special if allows(mask, i)} == smollm.stop_ids
    assert not any(allows(mask, smollm.vocab_size + i) for i in range(40))
    mask = fed(grammars.compile(AB)(), smollm, "a").allowed(())[0]
    assert not any(allows(mask, i) for i in smollm.stop_ids)


@pytest.mark.parametrize("grammar", [AB, NAME, Grammar.choice(["<|im_start|>x", "<|im_end|>"])])
def test_ends(grammar: Grammar, grammars: Grammars, smollm: Tokenizer) -> None:
    text = {"regex": "abb", "choice": "<|im_end|>"}.get(grammar.kind, '{"temperature_unit":"c"}')
    matcher = fed(grammars.compile(grammar)(), smollm, text)
    assert matcher.finished == (grammar is not AB)
    matcher.accept(next(iter(smollm.stop_ids)))
    assert matcher.finished
    assert matcher.forced(4) == ()


def test_guesses_leave_no_trace(grammars: Grammars, smollm: Tokenizer, drawing: Drawing) -> None:
    """Masks after guesses are those after the same tokens; right and wrong guesses are undone."""
    start = grammars.compile(NAME)
    for _ in range(20):
        ids = smollm.encode(drawing.answer(start, 30).decode(), add_bos=False)
        guessing, plain = start(), start()
        for n, token in enumerate(ids):
            if not allows(plain.allowed(())[0], token):
                break
            guesses = [*ids[n : n + drawing.random.randint(0, 4)], *drawing.random.sample(ids, 1)]
            for mask, guess in zip(guessing.allowed(guesses), [token, *guesses[1:]], strict=False):
                assert np.array_equal(mask, plain.allowed(())[0]) or guess != token
                break
            following = guessing.allowed([token])[1]
            guessing.accept(token)
            plain.accept(token)
            assert np.array_equal(following, plain.allowed(())[0])


def test_a_wrong_token_is_an_error(grammars: Grammars, smollm: Tokenizer) -> None:
    matcher = grammars.compile(AB)()
    with pytest.raises(SamplingFailed, match="cannot go on"):
        matcher.accept(smollm.encode("x", add_bos=False)[0])


def test_a_limit_on_the_way_is_an_error(grammars: Grammars, smollm: Tokenizer) -> None:
    start = grammars.compile(Grammar("regex", "(\\w+\\s?){1,2000}"))
    with pytest.raises(SamplingFailed, match="too many expressions"):
        fed(start(), smollm, "word tomorrow " * 500)


def test_forced(grammars: Grammars, smollm: Tokenizer) -> None:
    matcher = fed(grammars.compile(NAME)(), smollm, '{"')
    ids = matcher.forced(8)
    assert b"".join(map(smollm.token_bytes, ids)) == b"temperature_unit"
    assert list(matcher.forced(1)) == list(ids[:1])
    assert not matcher._rows  # masks are made later, while the executor runs
    for token in ids:
        assert allows(matcher.allowed(())[0], token)
        matcher.accept(token)
    assert list(grammars.compile(Grammar("regex", "é[ab]"))().forced(4)) == smollm.encode("é")


def test_masks_are_made_once(
    grammars: Grammars, smollm: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often they are asked for, as drafts do with each guess more."""
    matcher = grammars.compile(Grammar("regex", "[a-z ]+"))()
    masks, made = matcher._mask, []
    monkeypatch.setattr(matcher, "_mask", lambda digits: made.append(digits) or masks(digits))
    guesses = smollm.encode("the sea and the moon", add_bos=False)
    for end in range(len(guesses) + 1):
        rows = matcher.allowed(guesses[:end])
    assert len(rows) == len(made) == len(guesses) + 1
    for guess, row in zip(guesses, rows, strict=False):
        assert np.array_equal(matcher.allowed(())[0], row)
        matcher.accept(guess)


def test_row_9_numbers_and_white_space_end(grammars: Grammars, smollm: Tokenizer) -> None:
    """However much a model likes digits or spaces."""
    digit, space = smollm.encode("7", add_bos=False)[0], smollm.encode(" ", add_bos=False)[0]
    for schema in ({}, {"type": "number"}, {"type": "array"}, {"type": "object"}):
        matcher, liked = grammars.compile(Grammar.json_schema(schema))(), 0
        if schema.get("type") in ("array", "object"):
            fed(matcher, smollm, "[" if schema["type"] == "array" else '{"a":')
        while liked < 100:
            mask = matcher.allowed(())[0]
            token = next((i for i in (space, digit) if allows(mask, i)), None)
            if token is None:
                break
            matcher.accept(token)
            liked += 1
        assert liked <= MAX_DIGITS + 1
    text = fed(grammars.compile(Grammar.json_schema({}))(), smollm, '"' + "7" * 100)
    assert allows(text.allowed(())[0], digit)
    exact = Grammar.json_schema({"const": 10**40})
    fed(grammars.compile(exact)(), smollm, str(10**40))


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("<|im_start|>", "<|endoftext|>")])
@pytest.mark.parametrize("begun", [True, False])
def test_after_reasoning(
    marks: tuple[str, str], begun: bool, grammars: Grammars, smollm: Tokenizer
) -> None:
    """Free text between marks, texts or control tokens, and only then the grammar."""
    start = grammars.compile(AB, after=Reasoning(*marks, begun))
    opening, closing = (smollm.encode(mark, add_bos=False, specials=True) for mark in marks)
    end = smollm.encode("<|im_end|>", add_bos=False, specials=True)[0]
    for thought in ("", "\nI may say {anything}.\n"):
        matcher = start()
        for token in (
            *([] if begun else opening),
            *smollm.encode(thought, add_bos=False),
            *closing,
        ):
            mask = matcher.allowed(())[0]
            assert allows(mask, token)
            assert not allows(mask, end)
            matcher.accept(token)
        fed(matcher, smollm, "\n\nabb")
        assert allows(matcher.allowed(())[0], end)
    if not begun:
        assert allows(fed(start(), smollm, "abb").allowed(())[0], end)


def sentencepiece(**changes: Any) -> Tokenizer:
    pieces = [
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "ab",
        "\u2581ab",
        "b\u2581",
        "\u00e9",
        "\u2581\u00e9",
        "x",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        | changes
    )


def test_sentencepiece() -> None:
    """Spaces belong to tokens, bytes stand for what has no piece, the byte 255 for nothing."""
    tokenizer = sentencepiece()
    grammars, drawing = Grammars(tokenizer, 320), Drawing(tokenizer)
    start = grammars.compile(Grammar("regex", "(?:ab |\u00e9|日){2,5}x"))
    for _ in range(20):
        assert re.fullmatch("(?:ab |\u00e9|日){2,5}x", drawing.answer(start).decode())
    assert not allows(grammars.compile(Grammar("regex", "(?s:.*)"))().allowed(())[0], 3 + 255)
    forced = list(grammars.compile(Grammar("regex", "ab é日x[ab]"))().forced(20))
    text = b"".join(map(tokenizer.token_bytes, forced)).decode()
    assert "ab é日x".startswith(text)
    assert len(text) > 3


def test_the_executor_has_fewer_ids_than_the_tokenizer(smollm: Tokenizer) -> None:
    grammars = Grammars(smollm, 1000)
    assert grammars.compile(AB)().allowed(())[0].shape == (32,)


def test_no_end_no_grammar() -> None:
    tokenizer = sentencepiece(**{"tokenizer.ggml.eos_token_id": None})
    assert not tokenizer.stop_ids
    with pytest.raises(InvalidRequest, match="no token that ends"):
        Grammars(tokenizer, 300).compile(AB)


def test_objects_that_list_properties_have_no_others(grammars: Grammars, smollm: Tokenizer) -> None:
    listed = {"type": "object", "properties": {"a": {"const": 1}}}
    for schema, other in (
        (listed, False),
        ({**listed, "additionalProperties": True}, True),
        ({"type": "object"}, True),
        ({"allOf": [listed, {"required": ["b"]}]}, True),
    ):
        matcher = fed(grammars.compile(Grammar.json_schema(schema))(), smollm, '{"')
        assert allows(matcher.allowed(())[0], smollm.encode("b", add_bos=False)[0]) == other
