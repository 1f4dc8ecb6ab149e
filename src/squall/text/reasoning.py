"""Sections in which models think before they answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from squall.text.tokenizer import Tokenizer

MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)


def control_id(tokenizer: Tokenizer, name: str) -> int | None:
    ids = tokenizer.encode(name, add_bos=False, specials=True)
    return ids[0] if len(ids) == 1 and tokenizer.is_special(ids[0]) else None


def control_ids(tokenizer: Tokenizer, names: Iterable[str]) -> dict[str, int]:
    return {name: i for name in names if (i := control_id(tokenizer, name)) is not None}


@dataclass(frozen=True)
class Reasoning:
    """What begins and ends such a section, and whether the prompt has begun one."""

    opening: str
    closing: str
    begun: bool = False

    def marks(self) -> list[str]:
        return [self.opening, self.closing]


def reasoning_of(source: str, prompt: str) -> Reasoning | None:
    """How an answer to the prompt reasons, told from the chat template's source.

    None where the model does not, or where the prompt has a section already, such as an empty one.
    """
    tail = prompt[-200:].rstrip()
    for opening, closing in MARKS:
        if closing in source:
            begun = tail.endswith(opening)
            return None if tail.endswith(closing) else Reasoning(opening, closing, begun)
    return None
