"""Byte-level BPE (`tokenizer.ggml.model = gpt2`) on the `tokenizers` library."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from squall.errors import InvalidCheckpoint
from squall.text import pretokenizers
from squall.text.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, literals

_LONG = 1 << 14  # characters; from here on the batch call pays, which tracks no offsets


# A million words of one digit take the library a second; between digits they need no context.
_DIGITS = re.compile(r"(?<=\d)(\d{256,})(?=\d)")


def _symbols() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: themselves in Latin-1, or else from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


BYTE_OF = _symbols()


class ByteLevel:
    """Words by pattern, then merges by rank over the UTF-8 bytes of each word."""

    space_after_control = False
    space_suffix = False

    def __init__(self, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> None:
        pre = pretokenizers.by_name(metadata.get("tokenizer.ggml.pre"))
        self.add_bos = pre.add_bos
        self._nfc = pre.nfc
        self._vocabulary = vocabulary
        tokens = vocabulary.tokens
        self._user = {tokens[i]: i for i in vocabulary.of_type(USER_DEFINED)}
        self._user_pattern = literals(self._user)
        self._library = _library(vocabulary, metadata.get("tokenizer.ggml.merges"), pre)
        self._digits_alone = len(self._library.pre_tokenizer.pre_tokenize_str("11")) == 2

    def encode(self, text: str, *, first: bool = True) -> list[int]:  # noqa: ARG002
        if self._nfc:
            text = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        for n, part in enumerate(self._user_pattern.split(text) if self._user else [text]):
            ids += [self._user[part]] if n % 2 else self._words(part)
        return ids

    def _words(self, text: str) -> list[int]:
        if len(text) < _LONG or not self._digits_alone:
            return ids_of(self._library, text) if text else []
        ids: list[int] = []
        for n, part in enumerate(_DIGITS.split(text)):
            if n % 2 == 0:
                ids += ids_of(self._library, part)
            else:
                of = {digit: self._words(digit) for digit in set(part)}
                ids += [i for digit in part for i in of[digit]]
        return ids

    def token_bytes(self, token: int, *, first: bool) -> bytes:  # noqa: ARG002
        text = self._vocabulary.tokens[token]
        if self._vocabulary.types[token] in (CONTROL, UNKNOWN, USER_DEFINED):
            return text.encode()
        try:
            return bytes([BYTE_OF[character] for character in text])
        except KeyError:  # not written in byte symbols, such as "[PAD151646]"
            return text.encode()


def ids_of(library: Any, text: str) -> list[int]:
    """What the library encodes a text to, without tokens around it."""
    if len(text) < _LONG:
        return list(library.encode(text, add_special_tokens=False).ids)
    return list(library.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _library(vocabulary: Vocabulary, merges: Any, pre: pretokenizers.Pre) -> Library:
    if not isinstance(merges, list):
        raise InvalidCheckpoint("tokenizer.ggml.merges is missing; a gpt2 vocabulary needs it")
    hidden = {i for i, kind in enumerate(vocabulary.types) if kind in (CONTROL, UNKNOWN)}
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if i not in hidden}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        model = models.BPE(vocab=ids, merges=pairs, ignore_merges=pre.ignore_merges)
    except Exception as error:
        raise InvalidCheckpoint(
            f"tokenizer.ggml.merges do not fit the vocabulary: {error}"
        ) from error
    library = Library(model)
    steps = pre.steps if pretokenizers.BYTES in pre.steps else (*pre.steps, pretokenizers.BYTES)
    library.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in steps])
    return library


def _step(step: str) -> Any:
    if step == pretokenizers.BYTES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Split(Regex(step), "isolated")
