"""Grammars of yacc: every answer parses with lark, which is given the same grammar by hand."""

from __future__ import annotations

from pathlib import Path

import lark
import pytest
from drawing import Drawing

from squall.errors import InvalidRequest
from squall.text.grammar import Grammar, Grammars
from squall.text.tokenizer import Tokenizer
from squall.text.yacc import lark_of_yacc

DATA = Path(__file__).parent / "grammars"
NAMES = ("arithmetic", "json", "c")


@pytest.fixture(scope="module")
def grammars(smollm: Tokenizer) -> Grammars:
    return Grammars(smollm, smollm.vocab_size)


@pytest.mark.parametrize("name", NAMES)
def test_answers_parse(name: str, grammars: Grammars, smollm: Tokenizer) -> None:
    start = grammars.compile(Grammar("yacc", (DATA / f"{name}.y").read_text()))
    oracle = lark.Lark((DATA / f"{name}.lark").read_text(), parser="lalr", lexer="contextual")
    drawing = Drawing(smollm, seed=3)
    for _ in range(30):
        text = drawing.answer(start, 25).decode()
        assert oracle.parse(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("arithmetic", "1 + 2*(34 -5)/ -6"),
        ("json", '{"a": [1.5e3, "x\\n", null], "b": {}}'),
        ("c", "int main(void) { int i = 0; while (i < 10) { i = i + 1; } return f(i, 'x'); }"),
    ],
)
def test_what_may_be_said(name: str, text: str, grammars: Grammars, smollm: Tokenizer) -> None:
    matcher = grammars.compile(Grammar("yacc", (DATA / f"{name}.y").read_text()))()
    for token in smollm.encode(text, add_bos=False):
        assert matcher.allowed(())[0][token // 32] >> (token % 32) & 1, smollm.token_bytes(token)
        matcher.accept(token)
    assert matcher.allowed(())[0][smollm.stop_ids and min(smollm.stop_ids) // 32] & 1


def test_what_it_is_in_lark() -> None:
    source = r"""
    /* a comment */ %{ #include <x.h> %}
    %union { int i; }
    %token <i> UNUSED   // all of this says nothing of texts
    %left '+' '-'
    %start top
    %%
    first : 'a' "b\"c" '\n' { $$ = "}"; /* } */ } | %empty ;
    top : first NUMBER %prec '-' | top '/' NUMBER | WORD
    WORD : "/[a-z]+/" ;
    NUMBER : /[0-9]+\/x/ ;
    SKIP : /[ \t]+/ | '#' ;
    %%
    int main(void) { return yyparse(); }
    """
    others = ' & ~("\\n" | "/" | "a" | "b\\"c")'
    assert lark_of_yacc(source).splitlines() == [
        "start: r1",
        'r0: "a" "b\\"c" "\\n" | ""',
        'r1: r0 r3 | r1 "/" r3 | r2',
        "r2: T0",
        "r3: T1",
        f"T0: /[a-z]+/{others}",
        f"T1: /[0-9]+\\/x/{others}",
        "%ignore /[ \\t]+/",
        '%ignore "#"',
    ]


def test_a_keyword_is_no_name(grammars: Grammars, smollm: Tokenizer) -> None:
    source = "%%\ns: 'int' NAME ';' | NAME ';';\nNAME: /[a-z]+/;\nSKIP: / /;"
    start = grammars.compile(Grammar("yacc", source))
    for text, right in (("int x;", True), ("x;", True), ("int int;", False), ("intx;", True)):
        matcher, allowed = start(), True
        for token in smollm.encode(text, add_bos=False):
            allowed = allowed and bool(matcher.allowed(())[0][token // 32] >> (token % 32) & 1)
            if allowed:
                matcher.accept(token)
        assert allowed == right, text


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("%%", "no rule ''"),
        ("%start x\n%%\na: 'b';", "no rule 'x'"),
        ("%%\na: 'b' { $$ = 1; ", "line 2: the action does not end"),
        ("%%\na: 'b\n;", "line 2: \"'b"),
        ("%%\n'a': b;", "line 2: \"'a'\" does not belong here"),
        ("%%\na: b: c;", "line 2"),
        ("%%\na: SKIP; SKIP: ' ';", "'SKIP' has no rule"),
        ("%%\na: 'x'; SKIP: a;", "SKIP is made of"),
        ("%token NUM\n%%\na: NUM;", "'NUM' has no rule: NUM: /pattern/;"),
    ],
)
def test_refused(source: str, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        Grammar("yacc", source)
