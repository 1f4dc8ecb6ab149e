"""Calls of tools in answers: each format, however the text is cut."""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from squall.text.answer import (
    AnswerParser,
    CallArguments,
    CallBegun,
    CallEnded,
    Event,
    Reasoned,
    Said,
)
from squall.text.tools import FORMATS, ToolFormat

CALLS = [
    ("get_weather", {"city": 'Zürich "mitte" \\ }{', "days": [1, {"a": None}], "emoji": "🌧️ 雨"}),
    ("ns.lookup-2", {}),
]
named = pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)


def answer(row: ToolFormat, calls: list[tuple[str, dict[str, object]]]) -> str:
    return row.text([(name, json.dumps(given, ensure_ascii=False)) for name, given in calls])


def joined(events: list[Event]) -> list[Event]:
    """The same events, with the texts of each kind that follow each other as one."""
    made: list[Event] = []
    for key, group in groupby(events, key=lambda e: (type(e), getattr(e, "index", 0))):
        same = list(group)
        if key[0] in (Said, Reasoned):
            made.append(key[0]("".join(e.text for e in same)))  # type: ignore[union-attr]
        elif key[0] is CallArguments:
            made.append(CallArguments(key[1], "".join(e.text for e in same)))  # type: ignore[union-attr]
        else:
            made += same
    return made


def parse(pieces: list[str], row: ToolFormat | None, **given: object) -> list[Event]:
    parser = AnswerParser(tools=row, seed="s", **given)  # type: ignore[arg-type]
    events = [event for piece in pieces for event in parser.push(piece)]
    return joined(events + parser.push("", final=True))


def calls_of(events: list[Event]) -> list[tuple[str, dict[str, object]]]:
    names = [event.name for event in events if isinstance(event, CallBegun)]
    arguments = [json.loads(event.text) for event in events if isinstance(event, CallArguments)]
    ended = [event.index for event in events if isinstance(event, CallEnded)]
    assert ended == list(range(len(names)))
    return list(zip(names, arguments, strict=True))


def several(row: ToolFormat) -> list[tuple[str, dict[str, object]]]:
    return CALLS if row.join is not None else CALLS[:1]


@named
def test_row_5_whatever_the_cuts_the_events_are_the_same(row: ToolFormat) -> None:
    text = "Let me see.\n\n" * (not row.bare) + answer(row, several(row))
    whole = parse([text], row)
    assert calls_of(whole) == several(row)
    assert [e for e in whole if isinstance(e, Said)] == [Said("Let me see.")] * (not row.bare)
    assert parse(list(text), row) == whole
    for cut in range(len(text)):
        assert parse([text[:cut], text[cut:]], row) == whole
