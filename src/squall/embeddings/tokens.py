"""Texts, and pairs of them, as ids of tokens: what a model's special tokens enclose.

Names of special tokens in a text are plain text, so that no text can end before it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from squall.checkpoints import Checkpoint
from squall.errors import InvalidCheckpoint, InvalidRequest
from squall.files import read_json, read_text
from squall.text.hf_tokenizer import library_of
from squall.text.tokenizer import Tokenizer
from squall.text.unigram import unigram
from squall.text.vocabulary import CONTROL, UNKNOWN, Vocabulary

Int32 = NDArray[np.int32]
Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
MAX_VOCABULARY_BYTES = 16 << 20
_SPACE = "▁"


class Text(NamedTuple):
    """Ids, and from which of them on they are of the second of two texts."""

    ids: Int32
    second: int


@dataclass(frozen=True, slots=True)
class Frame:
    """Ids around a text, and between two; marks: what stands for ids of the second, 0 or 1."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    between: tuple[int, ...] | None = None
    after_pair: tuple[int, ...] = ()
    marks: int = 0


@dataclass(frozen=True, slots=True)
class Tokens:
    """encode: ids of texts, without those of the frame. find: the id of a token, if there is one.

    lower: texts become lower case first.
    """

    encode: Encode
    find: Callable[[str], int | None]
    frame: Frame
    lower: bool = False

    def bodies(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        given = [text.lower() for text in texts] if self.lower else list(texts)
        try:
            return self.encode(given)
        except (TypeError, UnicodeEncodeError):
            raise InvalidRequest("a text has half a surrogate pair; send valid Unicode") from None
        except (InvalidRequest, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics, of broken files, are no Exceptions
            raise InvalidCheckpoint(f"the tokenizer cannot read a text: {error}") from None

    def texts(self, bodies: Sequence[Sequence[int]], limit: int | None) -> list[Text]:
        """Texts in their frame. limit: of ids, to which they are cut."""
        frame = self.frame
        room = None if limit is None else max(limit - len(frame.before) - len(frame.after), 0)
        made = ((*frame.before, *body[:room], *frame.after) for body in bodies)
        return [Text(np.array(ids, np.int32), len(ids)) for ids in made]

    def pairs(
        self, query: Sequence[int], bodies: Sequence[Sequence[int]], limit: int | None
    ) -> list[Text]:
        """The query with each of the texts; of what is too long the longer gives way."""
        frame = self.frame
        assert frame.between is not None
        around = len(frame.before) + len(frame.between) + len(frame.after_pair)
        made = []
        for body in bodies:
            first, second = len(query), len(body)
            if limit is not None and first + second > (room := max(limit - around, 0)):
                shorter = min(first, second, room // 2)
                longer = room - shorter
                first, second = (shorter, longer) if first <= second else (longer, shorter)
            head = (*frame.before, *query[:first], *frame.between)
            ids = (*head, *body[:second], *frame.after_pair)
            made.append(Text(np.array(ids, np.int32), len(head) if frame.marks else len(ids)))
        return made


def open_tokens(
    checkpoint: Checkpoint, tokenizer_json: Path | None, *, lower: bool,
    around: tuple[str, str] | None = None,
) -> Tokens:  # fmt: skip
    """From tokenizer.json, or vocab.txt of a BERT, or a GGUF file's metadata.

    around: texts with special tokens that stand around each, instead of the tokenizer's.
    """
    if checkpoint.kind == "gguf" and tokenizer_json is None:
        make = _GGUF.get(str(checkpoint.metadata.get("tokenizer.ggml.model")))
        if make is None:
            return _of_gguf(checkpoint.metadata, around)
        return _of_library(make(checkpoint.metadata), lower=lower)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config = read_json(folder / "tokenizer_config.json") or {}
    text = read_text(tokenizer_json or folder / "tokenizer.json")
    if text is not None:
        found = _of_library(library_of(text), lower=lower, around=around)
        given = config.get("model_input_names")
        plain = isinstance(given, list) and "token_type_ids" not in given
        return replace(found, frame=replace(found.frame, marks=0)) if plain else found
    words = read_text(folder / "vocab.txt", MAX_VOCABULARY_BYTES)
    if words is None:
        raise InvalidCheckpoint(f"{str(folder)!r} has neither tokenizer.json nor vocab.txt")
    vocabulary = {word: at for at, word in enumerate(words.removesuffix("\n").split("\n"))}
    return _of_library(_word_pieces(vocabulary, config), lower=lower)


def _of_library(library: Any, *, lower: bool, around: tuple[str, str] | None = None) -> Tokens:
    if around is None:
        frame = _frame(library)
    else:
        before, after = (library.encode(t, add_special_tokens=False).ids for t in around)
        frame = Frame(tuple(before), tuple(after))
    library.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[list[int]]:
        found = library.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    return Tokens(encode, library.token_to_id, frame, lower)


def _frame(library: Any) -> Frame:
    """What the tokenizer puts around a text and a pair, found by trying."""
    one, two = library.encode("a"), library.encode("a", "a")
    of_one, of_two = one.sequence_ids, two.sequence_ids
    if 0 not in of_one or 1 not in of_two:
        raise InvalidCheckpoint("the tokenizer makes no token of 'a'")
    before, end = of_one.index(0), len(of_one) - of_one[::-1].index(0)
    first_end, second = len(of_two) - of_two[::-1].index(0), of_two.index(1)
    second_end = len(of_two) - of_two[::-1].index(1)
    return Frame(
        tuple(one.ids[:before]), tuple(one.ids[end:]), tuple(two.ids[first_end:second]),
        tuple(two.ids[second_end:]), two.type_ids[second],
    )  # fmt: skip


def _word_pieces(vocabulary: Mapping[str, int], config: Mapping[str, Any]) -> Any:
    """BERT's tokenizer, as transformers makes it of a vocab.txt."""

    def flag(name: str, default: bool | None) -> bool | None:
        value = config.get(name, default)
        return value if isinstance(value, bool) else default

    cls, sep, unknown = (_named(config, name) for name in ("cls", "sep", "unk"))
    try:
        library = Library(models.WordPiece(dict(vocabulary), unk_token=unknown))
        library.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=flag("tokenize_chinese_chars", True) is not False,
            strip_accents=flag("strip_accents", None),
            lowercase=flag("do_lower_case", True) is not False,
        )
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.add_special_tokens([AddedToken(name) for name in (cls, sep, unknown)])
        library.post_processor = processors.BertProcessing(
            (sep, vocabulary[sep]), (cls, vocabulary[cls])
        )
    except Exception as error:  # the library has no class for its own
        raise InvalidCheckpoint(f"the vocabulary is no BERT's: {str(error)[:200]}") from None
    return library


def _named(config: Mapping[str, Any], name: str) -> str:
    value = config.get(f"{name}_token", f"[{name.upper()}]")
    return str(value.get("content") if isinstance(value, dict) else value)


def _gguf_word_pieces(metadata: Mapping[str, Any]) -> Any:
    """Words begin with a mark there that vocab.txt has not, and pieces lack the one that it has."""
    found = Vocabulary.from_gguf(metadata)
    special = {found.tokens[i] for i in found.of_type(CONTROL, UNKNOWN)}
    vocabulary = {
        token if token in special else token[1:] if token[:1] == _SPACE else f"##{token}": i
        for i, token in enumerate(found.tokens)
    }

    cls = _token(metadata, found, "cls", _token(metadata, found, "bos", "[CLS]"))
    # Its name is misspelt in files.
    names = {"cls": cls, "sep": _token(metadata, found, "seperator", "[SEP]")}
    names["unk"] = _token(metadata, found, "unknown", "[UNK]")
    return _word_pieces(vocabulary, {f"{name}_token": text for name, text in names.items()})


def _gguf_unigram(metadata: Mapping[str, Any]) -> Any:
    """XLM-RoBERTa's."""
    found = Vocabulary.from_gguf(metadata)
    bos, eos = _token(metadata, found, "bos", "<s>"), _token(metadata, found, "eos", "</s>")
    try:
        library = unigram(found, metadata)
        end, begin = ((text, found.tokens.index(text)) for text in (eos, bos))
        library.post_processor = processors.RobertaProcessing(
            end, begin, trim_offsets=False, add_prefix_space=False
        )
    except Exception as error:  # the library has no class for its own
        raise InvalidCheckpoint(f"the vocabulary is no XLM-R's: {str(error)[:200]}") from None
    return library


def _token(metadata: Mapping[str, Any], found: Vocabulary, name: str, default: str) -> str:
    i = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return found.tokens[i] if isinstance(i, int) and i < len(found.tokens) else default


_GGUF: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "bert": _gguf_word_pieces, "t5": _gguf_unigram,
}  # fmt: skip


def _of_gguf(metadata: Mapping[str, Any], around: tuple[str, str] | None) -> Tokens:
    """Of files that say with which tokens a text ends, and a pair's first."""
    tokenizer = Tokenizer.from_gguf(metadata)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode(text, add_bos=False) for text in texts]

    def added(name: str, token: object) -> tuple[int, ...]:
        wanted = metadata.get(f"tokenizer.ggml.add_{name}_token") is True
        return (token,) if wanted and isinstance(token, int) else ()

    end = added("eos", tokenizer.eos)
    apart = added("sep", metadata.get("tokenizer.ggml.seperator_token_id", tokenizer.eos))
    frame = Frame(tuple(tokenizer.encode("")), end, (*end, *apart), end)
    if around is not None:
        first, last = (tokenizer.encode(t, add_bos=False, specials=True) for t in around)
        frame = Frame(tuple(first), tuple(last))
    return Tokens(encode, tokenizer.controls.get, frame)
