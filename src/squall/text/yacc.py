"""Grammars of yacc, rewritten as Lark: rules, quoted texts, and patterns between slashes.

What matches the pattern of a rule and is also a quoted text of the grammar is that text, as in
lexers. Actions, precedences and declared types say nothing of which texts there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from squall.errors import InvalidRequest

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/|%\{.*?%\})
      | (?P<mark>%%)
      | (?P<option>%[A-Za-z][\w-]*)
      | (?P<text>"(?:[^"\\\n]|\\.)+"|'(?:[^'\\\n]|\\.)+')
      | (?P<regex>/(?:[^/\\\n]|\\.)+/)
      | (?P<name>[A-Za-z_.][\w.]*)
      | (?P<type><[^<>\n]*>)
      | (?P<number>\d+)
      | (?P<sign>[:|;{])""",
    re.VERBOSE | re.DOTALL,
)
# Braces of an action that are inside of its own texts and comments do not count.
_ACTION = re.compile(
    r"""[{}]|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|//[^\n]*|/\*.*?\*/""", re.DOTALL
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "a": "\a", "b": "\b"}
_Token = tuple[str, str, int]  # kind, text, where it begins
_Rules = dict[str, list[list[_Token]]]


def lark_of_yacc(source: str) -> str:
    """The same grammar in llguidance's Lark; raises InvalidRequest with the line of an error."""
    tokens = list(_tokens(source))
    marks = [n for n, (kind, *_) in enumerate(tokens) if kind == "mark"]
    if not marks:
        raise InvalidRequest("a yacc grammar has its rules after a line with %%")
    rules = _rules(source, tokens[marks[0] + 1 : [*marks, len(tokens)][1]])
    named = [tokens[n + 1][1] for n in range(marks[0]) if tokens[n][:2] == ("option", "%start")]
    start = named[-1] if named else next(iter(rules), "")
    if start not in rules:
        raise InvalidRequest(f"the yacc grammar has no rule {start!r:.80} to start with")
    return _written(source, rules, start)


def _tokens(source: str) -> Iterator[_Token]:
    at, marks = 0, 0
    while at < len(source) and marks < 2:  # after the second, what is there is C
        found = _TOKEN.match(source, at)
        if found is None:
            raise _error(source, at, f"{source[at : at + 20]!r} is nothing that yacc has")
        kind = str(found.lastgroup)
        marks += kind == "mark"
        if kind != "skip":
            yield kind, found[0], at
        at = found.end() if found[0] != "{" else _end_of_action(source, at)


def _end_of_action(source: str, start: int) -> int:
    depth = 0
    for found in _ACTION.finditer(source, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
    raise _error(source, start, "the action does not end")


def _rules(source: str, tokens: Sequence[_Token]) -> _Rules:
    """The alternatives of each rule, without what is no symbol."""
    rules: _Rules = {}
    current: list[list[_Token]] | None = None
    skipped = -1
    for n, token in enumerate(tokens):
        kind, text, at = token
        following = tokens[n + 1][1] if n + 1 < len(tokens) else ""
        if n == skipped or kind == "type" or text in ("%empty", "{"):
            continue
        if text == "%prec":
            skipped = n + 1
        elif kind == "name" and following == ":":
            current = rules.setdefault(text, [])
            current.append([])
            skipped = n + 1
        elif current is None or kind not in ("name", "text", "regex", "sign") or text == ":":
            raise _error(source, at, f"{text!r:.40} does not belong here")
        elif text == ";":
            current = None
        elif text == "|":
            current.append([])
        else:
            current[-1].append(token)
    return rules


def _written(source: str, rules: _Rules, start: str) -> str:
    names = {name: f"r{n}" for n, name in enumerate(rules)}
    skip = [symbol for row in rules.pop("SKIP", []) for symbol in row]
    used = [symbol for rows in rules.values() for row in rows for symbol in row]
    texts = sorted({_text(t) for kind, t, _ in used if kind == "text" and not _is_regex(t)})
    others = f" & ~({' | '.join(map(json.dumps, texts))})" if texts else ""
    patterns: dict[str, str] = {}

    def written(symbol: _Token) -> str:
        kind, text, at = symbol
        if kind == "name":
            if text not in names or text == "SKIP":
                raise _error(source, at, f"{text!r:.40} has no rule: {text[:20]}: /pattern/;")
            return names[text]
        if kind == "regex" or _is_regex(text):
            return patterns.setdefault(_regex(text), f"T{len(patterns)}")
        return json.dumps(_text(text))

    lines = [f"start: {names[start]}"]
    for name, rows in rules.items():
        lines.append(
            f"{names[name]}: " + " | ".join(" ".join(map(written, r)) or '""' for r in rows)
        )
    lines += [f"{name}: {pattern}{others}" for pattern, name in patterns.items()]
    for kind, text, at in skip:
        if kind == "name":
            raise _error(source, at, "SKIP is made of quoted texts and patterns")
        pattern = _regex(text) if kind == "regex" or _is_regex(text) else json.dumps(_text(text))
        lines.append(f"%ignore {pattern}")
    return "\n".join(lines)


def _is_regex(quoted: str) -> bool:
    """Whether a quoted text is a pattern: "/[0-9]+/"."""
    return len(quoted) > 4 and quoted[1] == quoted[-2] == "/"


def _regex(text: str) -> str:
    """A pattern between slashes, where Lark wants those inside of it escaped."""
    from llguidance import regex_to_lark

    body = text[1:-1] if text[0] == "/" else text[2:-2]
    return f"/{regex_to_lark(body.replace(chr(92) + '/', '/'), 'dw')}/"


def _text(quoted: str) -> str:
    return re.sub(
        r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), quoted[1:-1], flags=re.DOTALL
    )


def _error(source: str, at: int, reason: str) -> InvalidRequest:
    return InvalidRequest(f"yacc grammar, line {source.count(chr(10), 0, at) + 1}: {reason}")
