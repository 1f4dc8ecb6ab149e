"""How models write calls of tools: a table, and what is made of its rows.

tool_formats.json has the rows, most specific first. In their texts `$` stands for a tool's name,
`~` for a call's id, `#` for its number and `'` for `"`. White space is written as the models do,
and read in any form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from squall.text.grammar import Grammar
    from squall.text.tools import Tool

TOOL_NAME = "[A-Za-z0-9_.-]{1,64}"
MAX_SPACE = 16  # characters of white space that a mark swallows
_MARK = re.compile(r"(<[|\uff5c][^<>]{1,40}[|\uff5c]>|\[/?[A-Z_]+\]|</?tool_call>)")
_SPACE = rf"[ \t\r\n]{{0,{MAX_SPACE}}}"
_ATOMS = {"$": f"({TOOL_NAME})", "~": "[A-Za-z0-9_-]{1,64}", "#": "[0-9]{1,4}"}
_TERMINALS = {"~": "ID", "#": "NUMBER"}
_RESULTS = re.compile(r"""['"]tool['"]""")
_AS_TEXT = re.compile(r"""arguments['"\]]*\s*(?:\+|-?\}\})""")
_AS_OBJECT = re.compile(r"""arguments['"\]]*\s*\|\s*(?:tojson|items)""")
_NO_SYSTEM = re.compile("system role (is )?not supported", re.IGNORECASE)
_LARK = r"""
TEXT: /(?s:.*)/
SPACE: /[ \n]{1,2}/
ID: /[A-Za-z0-9]{9}/
NUMBER: /[0-9]{1,3}/
"""


def control_id(tokenizer: Tokenizer, mark: str) -> int | None:
    """The id of a control token of that name, if there is one."""
    ids = tokenizer.encode(mark, add_bos=False, specials=True)
    return ids[0] if len(ids) == 1 and tokenizer.is_special(ids[0]) else None


@dataclass(frozen=True)
class Pattern:
    """What begins with one of several texts of a row, and what may yet do so."""

    whole: re.Pattern[str]
    part: re.Pattern[str]

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, *texts: str) -> Pattern:
        """White space may be around the punctuation of JSON."""
        rows = [_atoms(text) for text in texts]
        return cls(
            re.compile("|".join("".join(atoms) for atoms in rows)),
            re.compile("|".join("".join(rf"(?:{atom}|\Z)" for atom in atoms) for atoms in rows)),
        )


def _atoms(text: str) -> list[str]:
    """Regexes of what follows each other."""
    found: list[str] = []
    for n, part in enumerate(_MARK.split(text)):
        for character in part:
            space = character.isspace() or (n % 2 == 0 and character in "{}[]:,")
            if space and found[-1:] != [_SPACE]:
                found.append(_SPACE)
            if not character.isspace():
                found.append(_ATOMS.get(character) or re.escape(character))
            if space and found[-1] != _SPACE:
                found.append(_SPACE)
    return found


@dataclass(frozen=True)
class Template:
    """What a chat template shows of tools by itself; the rest it is given as text."""

    tools: str = "text"  # or "variable", or "system": a key of the system message
    calls: bool = False
    results: str = "user"  # the role of their messages
    objects: bool = True  # arguments are objects, not JSON
    system: bool = True  # there may be a system message


@dataclass(frozen=True)
class ToolFormat:
    """How calls look: opening, lead, calls with joins between, closing.

    A call is a head, its arguments and a tail. Of several texts the first is what models are made
    to write; the others are read too.
    """

    name: str
    told_by: str  # a regex that the source of a chat template has
    opening: str  # from here on it is a call
    heads: tuple[str, ...]
    tails: tuple[str, ...]
    leads: tuple[str, ...] = ("",)
    join: str | None = None  # None: there is one call at most
    closings: tuple[str, ...] = ("",)
    bare: bool = False  # an answer may also begin with a head
    answer: tuple[str, ...] = ()  # control tokens before and after an answer without calls
    short_ids: bool = False  # of 9 letters and digits
    results: str = "user"  # their role where the template does not know `tool`
    native: bool = True  # the template may know this format
    template: Template = Template()
    controls: Mapping[str, int] = field(default_factory=dict)  # marks that are control tokens

    def bind(self, source: str, tokenizer: Tokenizer) -> ToolFormat:
        """The row, knowing what a chat template and a vocabulary have of it."""
        controls = {m: i for m in self.marks() if (i := control_id(tokenizer, m)) is not None}
        tools = "variable" if re.search(r"\btools\b", source) else "text"
        template = Template(
            tools="system" if "'tools' in message" in source else tools,
            calls="tool_calls" in source,
            results="tool" if _RESULTS.search(source) else self.results,
            objects=not _AS_TEXT.search(source) or bool(_AS_OBJECT.search(source)),
        )
        template = replace(
            template if self.native else Template(), system=not _NO_SYSTEM.search(source)
        )
        return replace(self, controls=controls, template=template)

    def marks(self) -> list[str]:
        """What may be control tokens."""
        parts = (self.opening, *self.leads, *self.heads, *self.tails, self.join or "")
        return list(
            dict.fromkeys(_MARK.findall("".join((*parts, *self.closings))) + [*self.answer])
        )

    def shown(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids of the control tokens whose names an answer's text must show."""
        marks = self.controls.keys() - {*self.answer}
        return frozenset(i for mark in marks if (i := control_id(tokenizer, mark)) is not None)

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """The messages and the tools as the chat template wants them."""
        from squall.text.conversation import conversation

        return conversation(self, messages, tools)

    def text(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, of a name and arguments, as the model writes them."""
        parts = []
        for i, (name, arguments) in enumerate(calls):
            head = self.heads[0].replace("#", str(i)).replace("~", "000000000").replace("$", name)
            parts.append(head + arguments + self.tails[0])
        opening = "" if self.bare else self.opening + self.leads[0]
        join = "\n" if self.join is None else self.join
        return opening + join.join(parts) + self.closings[0]

    # What an answer is read with

    @cached_property
    def first(self) -> Pattern:
        """The opening and all up to the first arguments."""
        texts = (lead + head for lead in self.leads for head in self.heads)
        return Pattern.of(*(" " + self.opening + text for text in texts))

    @cached_property
    def bare_first(self) -> Pattern:
        """The same without the opening."""
        return Pattern.of(*(" " + head for head in self.heads))

    @cached_property
    def more(self) -> Pattern | None:
        """All between the arguments of two calls, if no opening is."""
        if self.join is None or self.opening in self.join:
            return None
        return Pattern.of(*(tail + self.join + head for tail in self.tails for head in self.heads))

    @cached_property
    def end(self) -> Pattern:
        """What follows the last arguments."""
        return Pattern.of(*(tail + closing for tail in self.tails for closing in self.closings))

    # What an answer is constrained with

    def grammar(self, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Grammar:
        """Text until a call begins, then calls that are valid, and the end.

        required: it begins with a call. parallel: several calls may follow each other.
        """
        from squall.text.grammar import Grammar

        return Grammar("lark", self.lark(tools, required=required, parallel=parallel))

    def lark(self, tools: Sequence[Tool], *, required: bool, parallel: bool) -> str:
        """The same in llguidance's Lark."""
        several = f" ({self._terms(self.join)} call)*" if parallel and self.join is not None else ""
        lead, closing = self._terms(self.leads[0]), self._terms(self.closings[0])
        space = "SPACE? " if self.leads[0][:1] == "[" else ""
        rules = [
            f"start: {'SPACE? (opening calls' if required else 'TEXT | (begun calls'}",
            f"opening: {self._terms(self.opening)}",
            f"begun[lazy]: TEXT {json.dumps(self.opening, ensure_ascii=False)}",
            f"calls: {space}{lead} call{several} {closing}",
            "call: " + " | ".join(f"call{i}" for i in range(len(tools))),
        ]
        if self.opening in self.controls and not required:
            rules[0] += " | TEXT opening calls"
        if self.answer and not required and self.controls.keys() >= {*self.answer}:
            rules[0] += f" | {' TEXT '.join(map(self._terms, self.answer))}"
        for i, tool in enumerate(tools):
            tail = f"arguments{i} {self._terms(self.tails[0])}"
            rules.append(f"arguments{i}: %json {json.dumps(tool.schema())}")
            rules.append(f"call{i}: {self._terms(self.heads[0].replace('$', tool.name))} {tail}")
            if self.bare:
                # Only with its name and key it is a call: answers may be JSON of the user's.
                head = Pattern.of(" " + self.heads[0].replace("$", tool.name).rstrip())
                rules.append(f"bare{i}[lazy]: /{head.whole.pattern}/")
                rules[0] += f" | bare{i} SPACE? {tail}"
        rules[0] += ")"
        return "\n".join(rules) + _LARK

    def _terms(self, text: str | None) -> str:
        """A text of the row in Lark: literals, terminals and control tokens."""
        return " ".join(
            map(self._term, filter(None, re.split(f"([~#])|{_MARK.pattern}", text or "")))
        )

    def _term(self, part: str) -> str:
        if part in self.controls:
            return f"<[{self.controls[part]}]>"
        return _TERMINALS.get(part) or json.dumps(part, ensure_ascii=False)


def _row(given: Mapping[str, Any]) -> ToolFormat:
    texts = {k: v.replace("'", '"') for k, v in given.items() if isinstance(v, str)}
    lists = {
        k: tuple(t.replace("'", '"') for t in v) for k, v in given.items() if isinstance(v, list)
    }
    return ToolFormat(**{**given, **texts, **lists})


_ROWS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
FORMATS: tuple[ToolFormat, ...] = tuple(map(_row, _ROWS))  # the last is of our own


def tool_format(source: str, tokenizer: Tokenizer) -> ToolFormat:
    """How the models of a chat template write calls; our own way where it does not say."""
    row = next(row for row in FORMATS if re.search(row.told_by, source, re.DOTALL))
    return row.bind(source, tokenizer)
