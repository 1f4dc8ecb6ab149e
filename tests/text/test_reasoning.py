"""Reasoning in answers: sections of several models, begun by the prompt or not, cut anywhere."""

from __future__ import annotations

import pytest

from squall.text.answer import AnswerParser, Event, Reasoned, Said
from squall.text.reasoning import MARKS, Reasoning, reasoning_of

marked = pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks[0])


def parse(text: str, reasoning: Reasoning | None) -> tuple[str, str]:
    """What is reasoned and what is said, the same by the character as at once."""
    found = []
    for size in (1, len(text) or 1):
        parser = AnswerParser(reasoning=reasoning)
        events: list[Event] = []
        for start in range(0, len(text), size):
            events += parser.push(text[start : start + size])
        events += parser.push("", final=True)
        found.append(
            tuple(
                "".join(event.text for event in events if isinstance(event, kind))
                for kind in (Reasoned, Said)
            )
        )
    assert found[0] == found[1]
    return found[0]  # type: ignore[return-value]


@marked
def test_sections(marks: tuple[str, str]) -> None:
    opening, closing = marks
    reasoning = Reasoning(opening, closing)
    assert parse(f"{opening}\nHm.\n{closing}\n\nYes.\n", reasoning) == ("Hm.", "Yes.\n")
    assert parse(f"\n{opening}a{closing}b", reasoning) == ("a", "b")
    assert parse(f"{opening}{closing}b", reasoning) == ("", "b")
    assert parse("Yes.", reasoning) == ("", "Yes.")
    assert parse(f"Yes, {opening}a{closing}", reasoning) == ("", f"Yes, {opening}a{closing}")
    assert parse(f"{opening}a{closing}b{opening}c{closing}", reasoning) == (
        "a",
        f"b{opening}c{closing}",
    )


@marked
def test_a_section_that_the_prompt_begins(marks: tuple[str, str]) -> None:
    opening, closing = marks
    reasoning = Reasoning(opening, closing, begun=True)
    assert parse(f"Hm.\n{closing}\n\nYes.", reasoning) == ("Hm.", "Yes.")
    assert parse(f"{opening}\nHm.{closing}Yes.", reasoning) == ("Hm.", "Yes.")
    assert parse(f"{closing}Yes.", reasoning) == ("", "Yes.")


@marked
def test_a_section_that_never_ends_is_all_reasoning(marks: tuple[str, str]) -> None:
    opening, closing = marks
    text = f"Hm. {closing[:-1]} \n"
    assert parse(text, Reasoning(opening, closing, begun=True)) == (text, "")
    assert parse(opening + text, Reasoning(opening, closing)) == (text, "")
    assert parse("", Reasoning(opening, closing, begun=True)) == ("", "")


@marked
def test_a_stray_closing_mark(marks: tuple[str, str]) -> None:
    """At the beginning it ends an empty section; elsewhere it is text."""
    opening, closing = marks
    assert parse(f"\n{closing}\n\nYes.", Reasoning(opening, closing)) == ("", "Yes.")
    assert parse(f"a {closing} b", Reasoning(opening, closing)) == ("", f"a {closing} b")


def test_what_may_be_a_mark_is_held_back_and_no_more() -> None:
    parser = AnswerParser(reasoning=Reasoning("<think>", "</think>"))
    assert parser.push("\n<th") == []
    assert parser.push("ink>\n") == []
    assert parser.push("Hm, ") == [Reasoned("Hm,")]
    assert parser.push("so</th") == [Reasoned(" so")]
    assert parser.push("en") == [Reasoned("</then")]
    assert parser.push("\n</think>") == []
    assert parser.push("\n") == []
    assert parser.push("Yes ") == [Said("Yes ")]


@marked
def test_told_from_template_and_prompt(marks: tuple[str, str]) -> None:
    opening, closing = marks
    source = f"... {opening} {closing} ..."
    assert reasoning_of(source, "user: hi\nassistant:") == Reasoning(opening, closing)
    assert reasoning_of(source, f"hi {opening}\n") == Reasoning(opening, closing, begun=True)
    assert reasoning_of(source, f"hi {opening}\n\n{closing}\n\n") is None
    assert reasoning_of("no marks", f"hi {opening}\n") is None
