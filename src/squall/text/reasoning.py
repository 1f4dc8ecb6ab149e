"""Sections in which models think before they answer."""

from __future__ import annotations

from dataclasses import dataclass

from squall.text.tokenizer import Tokenizer

MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)


@dataclass(frozen=True)
class Reasoning:
    """What begins and ends such a section, and whether the prompt has begun one."""

    opening: str
    closing: str
    begun: bool = False

    def shown(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids of the marks that are control tokens, whose names an answer's text must show."""
        marks = (self.opening, self.closing)
        ids = [tokenizer.encode(mark, add_bos=False, specials=True) for mark in marks]
        return frozenset(i[0] for i in ids if len(i) == 1 and tokenizer.is_special(i[0]))


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
