"""Grammars with random edits: compiled or refused, in no time, and no process dies of them."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from squall.checkpoints.gguf import open_gguf
from squall.embedded import find
from squall.errors import InvalidRequest, SamplingFailed
from squall.text.grammar import Grammar, Grammars
from squall.text.tokenizer import Tokenizer

SOURCES = Path(__file__).parents[1] / "text" / "grammars"
SCHEMA = {
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
    "anyOf": [{"type": "array", "prefixItems": [{"pattern": "^a+$"}], "maxItems": 3},
              {"$ref": "#/$defs/node"}, {"type": "number", "multipleOf": 5, "minimum": -2.5},
              {"allOf": [{"type": "string", "format": "date"}, {"minLength": 3}]}],
}  # fmt: skip
LARK = r"""start: "a" %json {"type": "object", "properties": {"a": {"const": 1}}} <[3]> x y?
x[suffix="</t>"]: /(?s:.*)/
y[lazy]: T & ~"k"
T: /a+/ | "b"{2,9}
%ignore / +/"""
PARTS = [*"{}[]()\"'/\\|:;*+?~&<>%@#,.0123456789azé\0\n", "%json", "%ignore", "9999", "type",
         "$ref", "[lazy]", "{1,100000}", "(?", "start", "-1"]  # fmt: skip


def edited(text: str, chosen: random.Random) -> str:
    for _ in range(chosen.randint(1, 4)):
        at, other = chosen.randrange(len(text) + 1), chosen.randrange(len(text) + 1)
        new = chosen.choice([chosen.choice(PARTS), text[other : other + 20], ""])
        text = text[:at] + new + text[at + chosen.randint(0, 5) * (not new) :]
    return text


@pytest.mark.slow("random edits for as long as there is time")
def test_random_edits(nightly: bool) -> None:
    chosen = random.Random(11)
    tokenizer = Tokenizer.from_gguf(open_gguf(find()).metadata)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    seeds = [("json_schema", json.dumps(SCHEMA)), ("lark", LARK), ("regex", "(a|b)*c{2,30}[^x]\\w")]
    seeds += [("lark" if p.suffix == ".lark" else "yacc", p.read_text()) for p in SOURCES.iterdir()]
    end = time.monotonic() + (300 if nightly else 6)
    compiled = 0
    while time.monotonic() < end:
        kind, text = chosen.choice(seeds)
        text, began = edited(text, chosen), time.monotonic()
        try:
            matcher = grammars.compile(Grammar(kind, text))()
            for _ in range(5):
                words = (mask := matcher.allowed(())[0]).nonzero()[0]
                word = int(mask[words[-1]])
                matcher.accept(int(words[-1]) * 32 + word.bit_length() - 1)
                matcher.forced(4)
            compiled += 1
        except (InvalidRequest, SamplingFailed):
            pass
        assert time.monotonic() - began < 5, (kind, text)
    assert compiled > 20
