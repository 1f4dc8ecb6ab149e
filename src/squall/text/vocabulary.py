"""What a checkpoint says of its vocabulary, checked once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from squall.errors import InvalidCheckpoint
from squall.text.fill import Fill, find_fill

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
_KEY = "tokenizer.ggml."
# As files call the tokens to fill in with: before, after, between; and as older ones do.
_FILL_NAMES = (("fim_pre", "prefix"), ("fim_suf", "suffix"), ("fim_mid", "middle"))
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")

# Tokens that end a turn or a text whatever the metadata says of them.
_STOP_TEXTS = """
<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <end_of_turn>
<turn|> <|endoftext|> <|end_of_text|> <|END_OF_TURN_TOKEN|> <|eot|> <EOT> _<EOT> [EOT] [EOS] <eos>
<end_of_utterance> <｜end▁of▁sentence｜> [e~[
"""  # noqa: RUF001
STOP_TEXTS = frozenset(_STOP_TEXTS.split())


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, their types (GGUF's numbers) and the ids with a meaning."""

    tokens: list[str]
    types: list[int]
    bos: int | None
    eos: int | None
    unknown: int | None
    stops: frozenset[int]
    fill: Fill | None = None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Reads `tokenizer.ggml.*`; raises InvalidCheckpoint where it is absent or inconsistent."""
        tokens = metadata.get(_KEY + "tokens")
        if not isinstance(tokens, list) or not tokens:
            raise InvalidCheckpoint(
                f"{_KEY}tokens is missing; convert the model with its tokenizer"
            )
        types = _types(metadata.get(_KEY + "token_type"), tokens)
        ids = {
            name: _id(metadata, name, len(tokens))
            for name in ("bos", "eos", "eot", "eom", "unknown", *chain(*_FILL_NAMES))
        }
        named_stops = [ids["eos"], ids["eot"], ids["eom"]]
        ends = stops(((token, i) for i, token in enumerate(tokens)), named_stops)
        named_fill = [ids[new] if ids[new] is not None else ids[old] for new, old in _FILL_NAMES]
        known = tuple(i for i in named_fill if i is not None)
        by_text = {token: i for i, token in enumerate(tokens)}
        fill = find_fill(by_text.get, known if len(known) == len(_FILL_NAMES) else ())
        named = [i for i in (ids["bos"], *ends) if i is not None]
        # Those that are words could be in any text; others may be parts of longer words.
        named += [i for i in (fill.tokens if fill else ()) if types[i] == USER_DEFINED]
        for i in named:  # some files call them normal, and then no template would work
            types[i] = CONTROL
        return cls(tokens, types, ids["bos"], ids["eos"], ids["unknown"], ends, fill)

    def of_type(self, *types: int) -> list[int]:
        """The ids of all tokens of these types, without empty ones."""
        return [i for i, kind in enumerate(self.types) if kind in types and self.tokens[i]]


def _types(value: Any, tokens: list[str]) -> list[int]:
    if value is None:
        return [BYTE if _BYTE_TOKEN.match(token) else 1 for token in tokens]
    types: list[int] = np.asarray(value).tolist()
    if len(types) != len(tokens):
        raise InvalidCheckpoint(
            f"{_KEY}token_type has {len(types)} entries for {len(tokens)} tokens"
        )
    return types


def _id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    value = metadata.get(f"{_KEY}{name}_token_id")
    if value is None:
        return None
    if not 0 <= int(value) < size:
        raise InvalidCheckpoint(
            f"{_KEY}{name}_token_id is {value}, the vocabulary has {size} tokens"
        )
    return int(value)


def stops(vocabulary: Iterable[tuple[str, int]], named: Iterable[int | None]) -> frozenset[int]:
    """The ids that end an answer: those `named`, and those whose texts are known for it."""
    found = {token: i for token, i in vocabulary if token in STOP_TEXTS}
    # Harmony ends messages, not answers, with <|end|>; it has <|return|> and <|call|> for those.
    if {"<|return|>", "<|call|>"} <= found.keys() or {"<|flush|>", "<|calls|>"} <= found.keys():
        found.pop("<|end|>", None)
    return frozenset(found.values()) | {i for i in named if i is not None}


def token_text(value: object) -> str | None:
    """The text of a token as configurations give it: a string, or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def token_ids(value: object) -> list[int]:
    """Token ids as configurations give them: none, one, or a list."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]


def literals(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the longest of `texts` at a place; linear however many there are.

    What it splits a text into is in turn between them and one of them.
    """
    trie: dict[str, Any] = {}
    for text in texts:
        node = trie
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    try:
        return re.compile(f"({_branch(trie) or '(?!)'})")
    except RecursionError:
        raise InvalidCheckpoint("the special tokens nest too deep to be matched") from None


def _branch(node: dict[str, Any]) -> str:
    branches = []
    for character, child in node.items():
        if not character:
            continue
        path = re.escape(character)
        while len(child) == 1 and "" not in child:
            ((character, child),) = child.items()
            path += re.escape(character)
        branches.append(path + _branch(child))
    if not branches:
        return ""
    body = f"(?:{'|'.join(branches)})"
    return body + "?" if "" in node else body
