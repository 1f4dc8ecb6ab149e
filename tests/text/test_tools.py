"""Calls of tools in answers: each format, however the text is cut."""

from __future__ import annotations

import codecs
import json
import random
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
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
from squall.text.reasoning import MARKS, Reasoning
from squall.text.tokenizer import Tokenizer
from squall.text.tool_formats import FORMATS, ToolFormat

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


def content(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Said))


THINK = Reasoning("<think>", "</think>")
reasoned = pytest.mark.parametrize("reasoning", [None, THINK], ids=["plain", "reasoning"])


@named
@reasoned
def test_row_5_whatever_the_cuts_the_events_are_the_same(
    row: ToolFormat, reasoning: Reasoning | None, smollm: Tokenizer
) -> None:
    text = "<think>\nHm: 雨?\n</think>\n\n" * (reasoning is not None)
    text += "Let me see, é.\n\n" * (not row.bare) + answer(row, several(row))
    whole = parse([text], row, reasoning=reasoning)
    assert calls_of(whole) == several(row)
    assert content(whole) == "Let me see, é." * (not row.bare)
    assert [e for e in whole if isinstance(e, Reasoned)] == [Reasoned("Hm: 雨?")] * bool(reasoning)
    assert parse(list(text), row, reasoning=reasoning) == whole
    raw = text.encode()
    for cut in range(len(raw)):
        decoder = codecs.getincrementaldecoder("utf-8")()
        pieces = [decoder.decode(raw[:cut]), decoder.decode(raw[cut:])]
        assert parse(pieces, row, reasoning=reasoning) == whole
    decoder = codecs.getincrementaldecoder("utf-8")()
    tokens = [smollm.token_bytes(token) for token in smollm.encode(text)]
    assert parse([decoder.decode(token) for token in tokens], row, reasoning=reasoning) == whole


@named
def test_a_call_without_marks_may_be_the_answer(row: ToolFormat) -> None:
    """As mistral.rs reads them, whatever the model; others of this kind are content."""
    keys = ("parameters",) if row.bare else ("arguments", "parameters")
    for key in keys:
        text = f' {{"name": "get_weather",\n"{key}": {json.dumps(CALLS[0][1])}}}\n'
        events = parse([text], row)
        assert calls_of(events) == CALLS[:1]
        assert content(events) == ""
        assert parse(list(text), row) == events
        for other in (text.replace("get_weather", "getter"), f"So:{text}", text.replace(key, "a")):
            for pieces in ([other], list(other)):
                assert content(parse(pieces, row, names=["get_weather"])) == other
    after = parse([text.strip() + row.text(CALLED)], row)
    assert [name for name, _ in calls_of(after)] == ["get_weather"] * (2 - row.bare)


CALLED = [("get_weather", json.dumps(CALLS[0][1]))]


@named
def test_row_6_a_call_that_was_cut_has_not_ended(row: ToolFormat) -> None:
    """However short the answer was cut, streamed or not: a call is ended only with all of it."""
    text = answer(row, several(row))
    ends = [row.text([("get_weather", json.dumps(CALLS[0][1], ensure_ascii=False))]), text]
    for length in range(len(text)):
        events = parse([text[:length]], row)
        assert parse(list(text[:length]), row) == events
        begun = [event.index for event in events if isinstance(event, CallBegun)]
        ended = [event.index for event in events if isinstance(event, CallEnded)]
        assert ended in (begun, begun[:-1])
        assert content(events) in text[: len(row.opening)] or row.bare
        for event in events:
            if isinstance(event, CallArguments):
                given = json.dumps(several(row)[event.index][1], ensure_ascii=False)
                assert given.startswith(event.text)
                assert (event.index in ended) is (event.text == given)
    assert len(calls_of(parse([ends[-1]], row))) == len(several(row))


@named
def test_the_arguments_are_told_as_they_come(row: ToolFormat) -> None:
    parser = AnswerParser(tools=row)
    text = row.text([("get_weather", '{"a": 1, "b": [2, 3]}')])
    start = text.index("{", text.index("get_weather"))
    parser.push(text[:start])
    told = [parser.push(character) for character in text[start : start + 21]]
    assert isinstance(told[0][0], CallBegun)
    arguments = [e.text for events in told for e in events if isinstance(e, CallArguments)]
    assert arguments == list('{"a": 1, "b": [2, 3]}')


@named
def test_text_that_only_looks_like_a_call_is_said(row: ToolFormat) -> None:
    """Nothing of it is lost, and a call may follow."""
    call = answer(row, CALLS[:1])
    for wrong in (
        row.opening + "!",
        row.opening * 2 + "-",
        f"see {row.opening} and {row.opening[:-1]}!",
        f"{row.opening}{{'name': 3}}",
        row.text([("unknown", "{}")]),
        call.replace("get_weather", "get weather"),
        row.text([("get_weather", "[1]")]),
        row.text([("get_weather", "null")]),
    ):
        for text in (wrong, f"{wrong} - {wrong}."):
            for pieces in ([text + "!"], list(text + "!")):
                events = parse(pieces, row, names=["get_weather"])
                assert events == [Said(text + "!")]
        if not row.bare:
            events = parse([f"{wrong}.{call}"], row, names=["get_weather"])
            assert calls_of(events) == CALLS[:1]
            assert content(events) == f"{wrong}."


@named
def test_only_what_may_begin_a_mark_is_held_back(row: ToolFormat) -> None:
    parser = AnswerParser(tools=row, reasoning=THINK)
    assert parser.push("Hi, ") == [Said("Hi,")]
    assert parser.push("you {a} [b] <c") == [Said(" you {a} [b] <c")]
    assert parser.push(" \n" + row.opening[0]) == []
    assert parser.push("~") == [Said(" \n" + row.opening[0] + "~")]


def test_the_page_has_all_formats() -> None:
    page = (Path(__file__).parents[2] / "docs/tools.md").read_text(encoding="utf-8")
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows == [row.name for row in FORMATS]


def test_without_tools_all_is_said() -> None:
    parser = AnswerParser()
    assert parser.push("<tool_call>") == [Said("<tool_call>")]
    assert parser.push("", final=True) == []


def test_space_in_calls_is_read_in_any_form() -> None:
    row = next(row for row in FORMATS if row.name == "hermes")
    text = 'A  <tool_call>{ "name"  :"f" ,"arguments":\n{ "a" : 1 }\n}  </tool_call> \n'
    assert parse([text], row) == parse(list(text), row)
    assert [event for event in parse([text], row) if isinstance(event, CallArguments)] == [
        CallArguments(0, '{ "a" : 1 }')
    ]
    assert content(parse([text], row)) == "A"


def test_text_after_calls_is_said() -> None:
    row = next(row for row in FORMATS if row.name == "hermes")
    text = answer(row, CALLS) + "\nDone.\n" + answer(row, CALLS[:1]) + "\nBye\n"
    for pieces in ([text], list(text)):
        events = parse(pieces, row)
        assert calls_of(events) == [*CALLS, CALLS[0]]
        assert content(events) == "Done.Bye\n"


def test_ids_are_the_same_for_the_same_seed() -> None:
    row = FORMATS[-1]
    text = answer(row, CALLS)

    def ids(seed: str) -> list[str]:
        events = AnswerParser(tools=row, seed=seed).push(text, final=True)
        return [event.id for event in events if isinstance(event, CallBegun)]

    assert ids("a") == ids("a")
    assert len({*ids("a"), *ids("b"), *ids(""), *ids("")}) == 8
    assert all(id_.startswith("call_") and len(id_) == 29 for id_ in ids("a"))


@named
def test_row_s14_time_grows_with_the_text_only(row: ToolFormat) -> None:
    """Marks, brackets, quotes and space without end, at once and by the character."""
    head = row.text([("f", "{")])[: row.text([("f", "{")]).index("{", 3 + row.bare) + 1]
    units = (row.opening, " ", row.opening + " ", "<think>", '{"', "[", "\\", row.heads[0], head)
    for unit in units:
        started = time.thread_time()
        parse([unit * (100_000 // len(unit))], row, reasoning=THINK)
        parser = AnswerParser(tools=row, reasoning=THINK)
        for character in unit * (6000 // len(unit)):
            parser.push(character)
            assert len(parser._held) < 1000
        assert time.thread_time() - started < 2


@named
def test_row_5_random_texts_of_marks_cut_at_random(
    row: ToolFormat, rng: np.random.Generator, nightly: bool
) -> None:
    random_ = random.Random(int(rng.integers(1 << 60)))
    call = answer(row, several(row))
    parts = [*MARKS[0], row.opening, row.leads[0], *row.tails, *row.closings, row.join or ""]
    parts += [
        row.heads[0].replace("$", "now"),
        call,
        "{}",
        "[",
        " ",
        "\n" * 5,
        " " * 20,
        "é",
        '"',
        "\\",
    ]
    for _ in range(3000 if nightly else 150):
        text = "".join(random_.choices(parts, k=random_.randrange(1, 9)))
        text = text[: random_.choice([len(text), random_.randrange(len(text) + 1)])]
        reasoning = random_.choice([None, THINK, replace(THINK, begun=True)])
        names = random_.choice([None, ["now"]])
        whole = parse([text], row, reasoning=reasoning, names=names)
        assert parse(list(text), row, reasoning=reasoning, names=names) == whole, text
        cuts = sorted(random_.randrange(len(text) + 1) for _ in range(4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(pieces, row, reasoning=reasoning, names=names) == whole, text
