"""Answers drawn at random from what a matcher allows."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from squall.text.grammar import Matcher
from squall.text.tokenizer import Tokenizer

LONGEST = 800


class Drawing:
    """Draws tokens; such as end something are likelier."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._lengths = np.array([len(token) for token in tokens])
        self._stops = np.isin(np.arange(len(tokens)), [*tokenizer.stop_ids])
        self._ends = np.array([token in (b'"', b"}", b"]", b")", b";") for token in tokens])
        self._signs = np.array([not token.isalnum() for token in tokens])

    def answer(self, start: Callable[[], Matcher], tokens: int = 40) -> bytes:
        """A whole answer, that ends as soon as it may after so many tokens."""
        matcher, ids = start(), list[int]()
        while not matcher.finished:
            assert len(ids) < LONGEST, self.text(ids)[-200:]
            allowed = self.allowed(matcher)
            hurry = len(ids) >= tokens
            texts, ends = allowed & ~self._stops, allowed & self._stops
            if ends.any() and (hurry or not texts.any() or self.random.random() < 0.2):
                matcher.accept(int(ends.argmax()))
                break
            ids.append(self._one(texts, hurry))
            matcher.accept(ids[-1])
        return self.text(ids)

    def allowed(self, matcher: Matcher) -> NDArray[np.bool_]:
        """Which ids may come next."""
        bits = np.unpackbits(matcher.allowed(())[0].view(np.uint8), bitorder="little")
        return bits[: len(self._stops)].astype(bool)

    def texts(self, matcher: Matcher) -> NDArray[np.bool_]:
        """The same without ids that end it."""
        return self.allowed(matcher) & ~self._stops

    def text(self, ids: list[int]) -> bytes:
        return b"".join(map(self.tokenizer.token_bytes, ids))

    def _one(self, texts: NDArray[np.bool_], hurry: bool) -> int:
        if (ends := texts & self._ends).any() and self.random.random() < (0.8 if hurry else 0.15):
            texts = ends
        elif hurry:  # what is short nests least, and what is no word may end something
            texts = texts & (self._lengths == self._lengths[texts].min())
            if (signs := texts & self._signs).any() and self.random.random() < 0.3:
                texts = signs
        return int(self.random.choice(np.flatnonzero(texts)))
