"""How models write calls of tools: a table, and what is made of its rows.

tool_formats.json has the rows, most specific first. In their texts `$` stands for a tool's name,
`~` for a call's id, `#` for its number and `'` for `"`. White space is written as the models do,
and read in any form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.text.reasoning import Reasoning, control_ids
from squall.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from squall.text.grammar import Grammar
    from squall.text.tools import Tool

TOOL_NAME = "[A-Za-z0-9_.-]{1,64}"
MAX_SPACE = 16  # characters of white space that a mark swallows
_MARK = re.compile(r"(<[|\uff5c][^<>]{1,40}[|\uff5c]>|\[/?[A-Z_]+\]|</?tool_call>)")
_SPACE = rf"[ \t\r\n]{{0,{MAX_SPACE}}}"
_ATOMS = {"$": f"({TOOL_NAME})", "~": "[A-Za-z0-9_-]{1,64}", "#": "[0-9]{1,4}"}
_BARE = tuple(f'{{"name": "$", "{key}": ' for key in ("arguments", "parameters"))
_RESULTS = re.compile(r"""['"]tool['"]""")
_AS_TEXT = re.compile(r"""arguments['"\]]*\s*(?:\+|-?\}\})""")
_AS_OBJECT = re.compile(r"""arguments['"\]]*\s*\|\s*(?:tojson|items)""")
_NO_SYSTEM = re.compile("system role (is )?not supported", re.IGNORECASE)
_TERMINALS = r"""
ANY: /(?s:.*)/
SPACE: /[ \n]{1,8}/
ID: /[A-Za-z0-9]{9}/
NUMBER: /[0-9]{1,3}/
"""


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
    told_by: str  # a regex that the source of a chat template begins with
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
        known = source if self.native else ""
        tools = "variable" if re.search(r"\btools\b", known) else "text"
        template = Template(
            tools="system" if "'tools' in message" in known else tools,
            calls="tool_calls" in known,
            results="tool" if _RESULTS.search(known) else self.results,
            objects=not _AS_TEXT.search(known) or bool(_AS_OBJECT.search(known)),
            system=not _NO_SYSTEM.search(source),
        )
        controls = control_ids(tokenizer, (*self.marks(), *self.answer))
        return replace(self, controls=controls, template=template)

    def marks(self) -> list[str]:
        """What may be control tokens."""
        parts = (self.opening, *self.leads, *self.heads, *self.tails, self.join or "")
        return _MARK.findall("".join((*parts, *self.closings)))

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
    def bared(self) -> ToolFormat:
        """A call that is the whole answer and has no marks, as models write it that know none."""
        if self.bare:
            return self
        return replace(
            self, leads=("",), heads=_BARE, tails=("}",), join=None, closings=("",), bare=True
        )

    @cached_property
    def bare_first(self) -> Pattern:
        """All up to its arguments."""
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

    def grammar(
        self,
        tools: Sequence[Tool],
        *,
        required: bool,
        parallel: bool,
        reasoning: Reasoning | None = None,
    ) -> Grammar:
        """Text until a call begins, then calls that are valid, and the end.

        required: it begins with a call. parallel: several calls may follow each other. reasoning:
        what may come before, which is not in the grammar.
        """
        from squall.text.grammar import Grammar

        rules = self._calls(tools, several=parallel and self.join is not None)
        # What a section begins with is no text: marks of calls in a section mean nothing.
        section = f" & ~/[ \\n]*{re.escape(reasoning.opening)}(?s:.*)/" if reasoning else ""
        forced = ["SPACE? opened", *["SPACE? calls"] * self.bare]
        starts = forced if required else self._starts(tools)
        rules = [f"start: {' | '.join(starts)}", *rules, f"TEXT: ANY{section}", _TERMINALS]
        return Grammar("lark", "\n".join(rules))

    def _calls(self, tools: Sequence[Tool], *, several: bool) -> list[str]:
        texts = (self.opening, self.leads[0], self.closings[0], self.tails[0], self.join)
        opening, lead, closing, tail, join = map(self._terms, texts)
        space = "SPACE?" if lead else ""
        # Where it is no control token it is told by all that has one form only.
        begin = Pattern.of(
            *(self.opening + lead.rstrip() for lead in self.leads if lead or not space)
        )
        rules = [
            f"begun[lazy]: TEXT /{begin.whole.pattern}/",
            f"after: {space} calls",
            f"opened: {opening} {space} {lead} calls",
            f"calls: call{f' ({join} call)*' if several else ''} {closing}",
            f"call: {' | '.join(f'call{i}' for i in range(len(tools)))}",
        ]
        for i, tool in enumerate(tools):
            head = self.heads[0].replace("$", tool.name)
            rules.append(f"arguments{i}: %json {json.dumps(tool.schema())}")
            rules.append(f"call{i}: {self._terms(head)} arguments{i} {tail}")
            # Only with its name and key it is a call: answers may be JSON of the user's.
            heads = (" " + head.replace("$", tool.name).rstrip() for head in self.bared.heads)
            rules.append(f"bare{i}[lazy]: /{Pattern.of(*heads).whole.pattern}/")
        return rules

    def _starts(self, tools: Sequence[Tool]) -> list[str]:
        starts = ["TEXT", "begun after"]
        if self.opening in self.controls:
            starts.append("TEXT opened")
        if self.answer and self.controls.keys() >= {*self.answer}:
            starts.append(" TEXT ".join(map(self._terms, self.answer)))
        tail = self._terms(self.bared.tails[0])
        return starts + [f"bare{i} SPACE? arguments{i} {tail}" for i in range(len(tools))]

    def _terms(self, text: str | None) -> str:
        """A text of the row in Lark: literals, terminals and control tokens."""
        parts = filter(None, re.split(f"([~#])|{_MARK.pattern}", text or ""))
        controls = {mark: f"<[{token}]>" for mark, token in self.controls.items()}
        terms = {"~": "ID", "#": "NUMBER", **controls}
        return " ".join(terms.get(part) or json.dumps(part, ensure_ascii=False) for part in parts)


def _rows() -> Iterator[ToolFormat]:
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    for row in json.loads(text.replace("'", '\\"')):
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        yield ToolFormat(**fields)


FORMATS = tuple(_rows())  # the last is our own


def tool_format(source: str, tokenizer: Tokenizer) -> ToolFormat:
    """How the models of a chat template write calls; our own way where it does not say."""
    row = next(row for row in FORMATS if re.match(row.told_by, source, re.DOTALL))
    return row.bind(source, tokenizer)
