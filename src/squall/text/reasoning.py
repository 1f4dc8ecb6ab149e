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


def control_ids(tokenizer: Tokenizer, names: Iterable[str]) -> dict[str, int]:
    """Those of the names that are control tokens, with their ids."""
    read = {name: tokenizer.encode(name, add_bos=False, specials=True) for name in names}
    return {n: ids[0] for n, ids in read.items() if len(ids) == 1 and tokenizer.is_special(ids[0])}


@dataclass(frozen=True)
class Reasoning:
    """What begins and ends such a section, and whether the prompt has begun one."""

    opening: str
    closing: str
    begun: bool = False

    def shown(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids of the marks that are control tokens, whose names an answer's text must show."""
        return frozenset(control_ids(tokenizer, (self.opening, self.closing)).values())


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
