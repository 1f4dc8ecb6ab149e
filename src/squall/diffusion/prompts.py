"""Prompts as the encoders of texts read them: ids of T5's tokens, and of CLIP's.

Names of special tokens in a prompt are read as such, as transformers does.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, UnsupportedModel
from squall.files import parse_json, read_text
from squall.text.bytelevel import ids_of
from squall.text.hf_tokenizer import library_of
from squall.text.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

JSON = "tokenizer.json"
_UNUSED = 5  # GGUF's number of this type of tokens
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# How CLIP reads a text, and cuts it into words.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_CLIP: Mapping[str, Any] = {
    "normalizer": {
        "type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        ],
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tokens:
    """library: of `tokenizers`. begin: ids before those of every text. end: the one after them."""

    library: Any
    begin: tuple[int, ...]
    end: int

    def encode(self, text: str) -> list[int]:
        """All ids of a text, with those that it begins and ends with."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the prompt has half a surrogate pair at character {error.start}; send valid "
                "Unicode"
            ) from None
        try:
            return [*self.begin, *ids_of(self.library, text), self.end]
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library's panics are no Exceptions
            raise InvalidCheckpoint(f"the tokenizer cannot read this prompt: {error}") from None


class T5Tokens(_Tokens):
    """Unigrams, and an end."""

    @classmethod
    def open(cls, path: Path) -> T5Tokens:
        """From a tokenizer.json, or a folder with one."""
        library = library_of(_text(path / JSON if path.is_dir() else path))
        return cls(library, (), _id(library, "</s>"))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> T5Tokens:
        """From the metadata of a T5's GGUF file."""
        model = metadata.get("tokenizer.ggml.model")
        if model != "t5":
            raise UnsupportedModel(f"tokenizer.ggml.model is {model!r:.99}; that of T5 is 't5'")
        v = Vocabulary.from_gguf(metadata)
        scores = _numbers(metadata, "scores", np.float64)
        named = v.of_type(CONTROL, UNKNOWN, USER_DEFINED)
        if v.eos is None or v.unknown is None or scores.shape != (len(v.tokens),):
            raise InvalidCheckpoint(
                f"{len(scores)} scores of {len(v.tokens)} tokens, the end {v.eos}, the unknown one "
                f"{v.unknown}: not what T5 needs; convert the model with its tokenizer"
            )
        # The rest fills the table up, and would pass for pieces.
        used = max(i for i, kind in enumerate(v.types) if kind != _UNUSED) + 1
        pieces = list(zip(v.tokens[:used], scores[:used].tolist(), strict=True))
        spec = {
            **_unigram(metadata),
            "model": {"type": "Unigram", "unk_id": v.unknown, "vocab": pieces},
            "added_tokens": [_added(i, v.tokens[i]) for i in named],
        }
        return cls(library_of(json.dumps(spec)), (), v.eos)

    def pad(self, ids: Sequence[int], length: int) -> list[int]:
        """As many as `length`; raises InvalidRequest where there are more."""
        if len(ids) > length:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens, and this model reads {length}; shorten it"
            )
        return [*ids, *[0] * (length - len(ids))]


class ClipTokens(_Tokens):
    """Byte-level BPE of lower case, between a beginning and an end."""

    @classmethod
    def open(cls, path: Path) -> ClipTokens:
        """From a tokenizer.json, a vocab.json with merges.txt beside it, or a folder of these."""
        if path.is_dir():
            path = path / (JSON if (path / JSON).is_file() else "vocab.json")
        text = _text(path)
        if path.name == "vocab.json":
            vocab = parse_json(text, path.name)
            lines = _text(path.with_name("merges.txt")).split("\n")
            text = json.dumps(_bpe(vocab, [line for line in lines if _is_merge(line)]))
        library = library_of(text)
        return cls(library, (_id(library, BEGIN),), _id(library, END))

    def pad(self, ids: Sequence[int], length: int) -> list[int]:
        """As many as `length`; of more, the first, and the end."""
        cut = ids if len(ids) <= length else [*ids[: length - 1], self.end]
        return [*cut, *[self.end] * (length - len(cut))]

    def pooled_row(self, ids: Sequence[int]) -> int:
        """Which row stands for the whole text: that of the first end."""
        return ids.index(self.end)


def _unigram(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What T5 does to a text before it looks for pieces."""
    space = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    steps: list[dict[str, Any]] = [
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": space, "split": True}
    ]
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", True):
        steps.insert(0, {"type": "WhitespaceSplit"})
    made: dict[str, Any] = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    if (table := _numbers(metadata, "precompiled_charsmap", np.uint8)).size:
        code = base64.b64encode(table.tobytes()).decode()
        made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": code}
    return made


def _numbers(metadata: Mapping[str, Any], name: str, dtype: type[np.generic]) -> NDArray[Any]:
    try:
        return np.asarray(metadata.get(f"tokenizer.ggml.{name}", ()), dtype)
    except (TypeError, ValueError, OverflowError):
        raise InvalidCheckpoint(f"tokenizer.ggml.{name} has no numbers as it should") from None


def _bpe(vocab: Mapping[str, Any], merges: Iterable[str]) -> dict[str, Any]:
    model = {
        "type": "BPE", "unk_token": END, "end_of_word_suffix": "</w>",
        "continuing_subword_prefix": "", "vocab": vocab, "merges": list(merges),
    }  # fmt: skip
    named = [_added(vocab[name], name) for name in (BEGIN, END) if name in vocab]
    return {**_CLIP, "model": model, "added_tokens": named}


def _is_merge(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#version")


def _added(id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": True, **flags}


def _text(path: Path) -> str:
    if (text := read_text(path)) is None:
        raise ModelNotFound(
            f"there is no {str(path)!r}; a prompt's tokens are read from {JSON}, and CLIP's from "
            "vocab.json and merges.txt too"
        )
    return text


def _id(library: Any, name: str) -> int:
    found: int | None = library.token_to_id(name)
    if found is None:
        raise InvalidCheckpoint(f"the tokenizer has no token {name}; it is of another model")
    return found
