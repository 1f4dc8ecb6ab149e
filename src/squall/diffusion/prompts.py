"""Prompts as the encoders of texts read them: ids of T5's tokens, and of CLIP's.

Names of special tokens in a prompt are read as such, as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, UnsupportedModel
from squall.files import parse_json, read_text
from squall.text.bytelevel import ids_of
from squall.text.hf_tokenizer import library_of
from squall.text.unigram import unigram
from squall.text.vocabulary import Vocabulary

JSON = "tokenizer.json"
BEGIN, END, T5_END = "<|startoftext|>", "<|endoftext|>", "</s>"
# How CLIP cuts a text into words.
_WORDS = r"<\|(start|end)oftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True)
class _Tokens:
    """library: of `tokenizers`. begin: ids before those of every text. end: the one after them."""

    library: Any
    begin: tuple[int, ...]
    end: int

    def encode(self, text: str) -> list[int]:
        """All ids of a text, with those that it begins and ends with."""
        try:
            return [*self.begin, *ids_of(self.library, text), self.end]
        except TypeError:
            raise InvalidRequest(
                "the prompt has half a surrogate pair; send valid Unicode"
            ) from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics, of broken files, are no Exceptions
            raise InvalidCheckpoint(f"the tokenizer cannot read the prompt: {error}") from None


class T5Tokens(_Tokens):
    """Pieces with scores, and an end."""

    @classmethod
    def open(cls, path: Path) -> T5Tokens:
        """From a tokenizer.json, or a folder with one."""
        library = library_of(_text(path / JSON if path.is_dir() else path))
        return cls(library, (), _id(library, T5_END))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> T5Tokens:
        """From the metadata of a T5's GGUF file."""
        model = metadata.get("tokenizer.ggml.model")
        if model != "t5":
            raise UnsupportedModel(f"tokenizer.ggml.model is {model!r:.99}; that of T5 is 't5'")
        vocabulary = Vocabulary.from_gguf(metadata)
        library = _made(lambda: unigram(vocabulary, metadata), "tokenizer.ggml")
        return cls(library, (), _id(library, T5_END))

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
            vocab, merges = parse_json(text, path.name), _text(path.with_name("merges.txt"))
            library = _made(lambda: _bpe(vocab, merges), "vocab.json with merges.txt")
        else:
            library = library_of(text)
        return cls(library, (_id(library, BEGIN),), _id(library, END))

    def pad(self, ids: Sequence[int], length: int) -> list[int]:
        """As many as `length`; of more, the first, and the end."""
        cut = ids if len(ids) <= length else [*ids[: length - 1], self.end]
        return [*cut, *[self.end] * (length - len(cut))]

    def pooled_row(self, ids: Sequence[int]) -> int:
        """Which row stands for the whole text: that of the first end."""
        return ids.index(self.end)


def _bpe(vocab: Any, merges: str) -> Any:
    lines = [
        line for line in merges.split("\n") if line.strip() and not line.startswith("#version")
    ]
    pairs: list[Any] = [tuple(line.split(" ")) for line in lines]
    library = Library(models.BPE(vocab, pairs, unk_token=END, end_of_word_suffix="</w>"))
    library.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([words, symbols])
    named = [AddedToken(name, normalized=False) for name in (BEGIN, END) if name in vocab]
    library.add_special_tokens(named)
    return library


def _made(make: Callable[[], Any], source: str) -> Any:
    try:
        return make()
    except Exception as error:  # the library has no class for its own
        raise InvalidCheckpoint(f"{source}: {str(error)[:200]}") from None


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
