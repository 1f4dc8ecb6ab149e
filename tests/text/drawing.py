"""Answers drawn at random from what a matcher allows."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from squall.text.grammar import Matcher
from squall.text.tokenizer import Tokenizer

LONGEST = 3000


def ids_of(mask: np.ndarray) -> list[int]:
    """The ids whose bits are set."""
    return list(map(int, np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))))


class Drawing:
    """Draws tokens, of a few hundred chosen at random and all that end something."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        known = range(tokenizer.vocab_size)
        self._ends = [i for i in known if tokenizer.token_bytes(i) in (b'"', b"}", b"]", b"0", b"9")]

    def answer(self, start: Callable[[], Matcher], tokens: int = 40) -> tuple[bytes, int]:
        """A whole answer, and the bytes of it that came before it was made to end soon."""
        matcher, ids, cut = start(), list[int](), 0
        while not matcher.finished:
            assert len(ids) < LONGEST, self.text(ids)[-200:]
            allowed = ids_of(matcher.allowed(())[0])
            ends = [i for i in allowed if i in self.tokenizer.stop_ids]
            hurry = len(ids) >= tokens
            if ends and (hurry or len(ends) == len(allowed) or self.random.random() < 0.2):
                matcher.accept(ends[0])
                break
            ids.append(self._one(allowed, hurry))
            matcher.accept(ids[-1])
            cut = cut if hurry else len(self.text(ids))
        return self.text(ids), cut

    def text(self, ids: list[int]) -> bytes:
        return b"".join(map(self.tokenizer.token_bytes, ids))

    def _one(self, allowed: list[int], hurry: bool) -> int:
        texts = [i for i in allowed if i not in self.tokenizer.stop_ids]
        ends = [i for i in self._ends if i in texts]
        if ends and (hurry or self.random.random() < 0.15):
            return self.random.choice(ends)
        if hurry:  # what is short nests least
            texts.sort(key=lambda i: len(self.tokenizer.token_bytes(i)))
            texts = texts[:20]
        return self.random.choice(texts)
