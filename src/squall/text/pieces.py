"""SentencePiece BPE (`tokenizer.ggml.model = llama`): merges by score, bytes for what has no piece.

Text is cut where no piece of the vocabulary holds both characters, so that no merge can cross the
cut; the parts, mostly words, are merged one by one and remembered. That needs no table of merges,
which for 256,000 pieces would take seconds to build at every start.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from operator import add
from typing import Any

from tokenizers import Tokenizer as Library
from tokenizers import models

from squall.errors import InvalidCheckpoint
from squall.text.vocabulary import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, literals

_SPACE = "\u2581"
_LONG = 20_000  # characters not seen before; from here on the Rust library may be faster
_REMEMBERED = 100_000  # words


class SentencePiece:
    """Merges neighbours whose joint piece has the best score, leftmost first, until none has."""

    space_suffix = False

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        scores = metadata.get("tokenizer.ggml.scores")
        if scores is None or len(scores) != len(vocabulary.tokens):
            raise InvalidCheckpoint("tokenizer.ggml.scores must have one score a token")
        self.add_bos = True
        self.space_after_control = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        self._vocabulary = vocabulary
        self._ids: dict[str, int] = {}
        self._cost: dict[str, float] = {}
        tokens, types = vocabulary.tokens, vocabulary.types
        for i, score in enumerate(map(float, scores)):
            if types[i] not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE):
                self._ids.setdefault(tokens[i], i)
                self._cost.setdefault(tokens[i], -score)
        self._user = {tokens[i].replace(" ", _SPACE): [i] for i in vocabulary.of_type(USER_DEFINED)}
        self._user_pattern = literals(self._user)
        self._bytes = {int(tokens[i][1:-1], 16): i for i in vocabulary.of_type(BYTE)}
        self._joined = _neighbours(self._ids)
        self._words = self._user.copy()  # no word holds a user-defined token

    def encode(self, text: str, *, first: bool = True) -> list[int]:  # noqa: ARG002
        """Ids of text that holds no control token and follows one, or is the start."""
        text = text.replace(" ", _SPACE)
        if self.space_after_control:
            text = _SPACE + text
        words: list[str] = []
        for n, part in enumerate(self._user_pattern.split(text) if self._user else [text]):
            words += [part] if n % 2 else self._cut(part)
        ids = self._of_words(words)
        return ids if self._bytes else _fused(ids, self._vocabulary.unknown)

    def token_bytes(self, token: int, *, first: bool) -> bytes:
        """What a token stands for; the first of a text loses the space that was put before it."""
        text, kind = self._vocabulary.tokens[token], self._vocabulary.types[token]
        if kind in (CONTROL, UNKNOWN):
            return text.encode()
        found = bytes([int(text[1:-1], 16)]) if kind == BYTE else text.replace(_SPACE, " ").encode()
        return found.removeprefix(b" ") if first and self.space_after_control else found

    def _of_words(self, words: list[str]) -> list[int]:
        known = self._words
        new = {word for word in words if word not in known}
        if len(known) + len(new) > _REMEMBERED:
            known = self._words = self._user.copy()
            new = {word for word in words if word not in known}
        known.update(self._merged(new))
        return [i for word in words for i in known[word]]

    def _cut(self, text: str) -> list[str]:
        if len(text) < 2:
            return [text] if text else []
        joined = self._joined
        cuts = [i for i, pair in enumerate(map(add, text, text[1:]), 1) if pair not in joined]
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _merged(self, words: set[str]) -> dict[str, list[int]]:
        if sum(map(len, words)) >= _LONG:
            characters = set().union(*words)
            pieces = [piece for piece in self._ids if characters.issuperset(piece)]
            costs = {self._cost[piece] for piece in pieces}
            if len(costs) == len(pieces) and 3 * len(pieces) < sum(map(len, words)):
                return self._merged_by_library(sorted(words), characters, pieces)
        return {
            word: [i for part in self._merge(word) for i in self._fallback(part)] for word in words
        }

    def _merge(self, word: str) -> list[str]:
        cost, last = self._cost, len(word)
        parts = list(word)
        after, before = list(range(1, last + 1)), list(range(-1, last - 1))
        heap = [
            (cost[pair], i, pair) for i, pair in enumerate(map(add, word, word[1:])) if pair in cost
        ]
        heapq.heapify(heap)
        while heap:
            _, i, piece = heapq.heappop(heap)
            j = after[i]
            if j >= last or not parts[i] or parts[i] + parts[j] != piece:
                continue  # one of the two has merged otherwise since
            parts[i], parts[j] = piece, ""
            k = after[i] = after[j]
            if k < last:
                before[k] = i
                if (pair := piece + parts[k]) in cost:
                    heapq.heappush(heap, (cost[pair], i, pair))
            h = before[i]
            if h >= 0 and (pair := parts[h] + piece) in cost:
                heapq.heappush(heap, (cost[pair], h, pair))
        return [part for part in parts if part]

    def _fallback(self, part: str) -> list[int]:
        found = self._ids.get(part)
        if found is not None:
            return [found]
        unknown = self._vocabulary.unknown
        as_bytes = (
            [self._bytes.get(byte, unknown) for byte in part.encode()] if self._bytes else [unknown]
        )
        return [i for i in as_bytes if i is not None]

    def _merged_by_library(
        self, words: list[str], characters: set[str], pieces: list[str]
    ) -> dict[str, list[int]]:
        """The same merges by `tokenizers`, from those pieces alone that these words can hold."""
        ids = {piece: self._ids[piece] for piece in pieces}
        first = len(self._vocabulary.tokens)
        absent = [character for character in characters if character not in ids]
        ids.update({character: first + n for n, character in enumerate(absent)})
        pieces.sort(key=self._cost.__getitem__)
        merges = [
            (piece[:k], piece[k:])
            for piece in pieces
            for k in range(1, len(piece))
            if piece[:k] in ids and piece[k:] in ids
        ]
        library = Library(models.BPE(vocab=ids, merges=merges))
        encoded = library.encode_batch_fast(words, add_special_tokens=False)
        instead = {first + n: self._fallback(character) for n, character in enumerate(absent)}
        return {
            word: [j for i in row.ids for j in instead.get(i, (i,))]
            for word, row in zip(words, encoded, strict=True)
        }


def _neighbours(pieces: Iterable[str]) -> frozenset[str]:
    joined: set[str] = set()
    for piece in pieces:
        joined.update(map(add, piece, piece[1:]))
    return frozenset(joined)


def _fused(ids: list[int], unknown: int | None) -> list[int]:
    """SentencePiece gives one unknown token for a run of characters without a piece."""
    return [i for n, i in enumerate(ids) if i != unknown or n == 0 or ids[n - 1] != unknown]
