"""Tokenizers of Hugging Face folders: tokenizer.json, run by the `tokenizers` library.

Control tokens are cut out before the library sees a text, and in the rest it takes their names for
plain text. What it makes of such a name is checked, for vocabularies may hold it as a word.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import parse_json, read_json, read_text
from squall.text.bytelevel import BYTE_OF, ids_of
from squall.text.fill import find_fill
from squall.text.tokenizer import Tokenizer
from squall.text.vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    stops,
    token_ids,
    token_text,
)

MAX_ID = 1 << 24
_BYTE = re.compile(r"\A<0x([0-9A-Fa-f]{2})>\Z")
_NOTHING = {"type": "BPE", "vocab": {}, "merges": []}
_Step = Callable[[str, bool], str]  # of a token, and whether it is the first


class HfTokenizer(Tokenizer):
    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], *, tokenizer_json: str | os.PathLike[str] | None = None
    ) -> HfTokenizer:
        """Read `tokenizer.json` and, where they exist, the configurations beside it.

        tokenizer_json: another file to use in its place.
        """
        files = _Files.read(Path(path), None if tokenizer_json is None else Path(tokenizer_json))
        library, vocabulary = _opened(files)
        prefix = _prefix(library, files, vocabulary.bos)
        added: dict[int, AddedToken] = library.get_added_tokens_decoder()
        return cls(
            vocabulary,
            _Codec(library, vocabulary, files.spec),
            prefix=prefix,
            lstrip=frozenset(i for i, token in added.items() if token.lstrip),
            rstrip=frozenset(i for i, token in added.items() if token.rstrip),
        )

    def token_bytes(self, token: int, *, first: bool = False) -> bytes:
        """The bytes a token stands for; none for the ids that pad a model's vocabulary."""
        return b"" if token >= self.vocab_size else super().token_bytes(token, first=first)


def read_vocabulary(path: Path) -> tuple[Vocabulary, Mapping[str, Any]]:
    """The vocabulary of a folder, and what its tokenizer.json says."""
    files = _Files.read(path, None)
    return _opened(files)[1], files.spec


@dataclass(frozen=True, slots=True)
class _Files:
    tokenizer: str
    spec: Mapping[str, Any]
    config: Mapping[str, Any]  # tokenizer_config.json over special_tokens_map.json
    added: Mapping[str, Any]  # added_tokens.json
    model: Sequence[Mapping[str, Any]]  # generation_config.json, config.json and its text_config

    @classmethod
    def read(cls, folder: Path, tokenizer_json: Path | None) -> _Files:
        file = tokenizer_json or folder / "tokenizer.json"
        text = read_text(file)
        if text is None:
            raise InvalidCheckpoint(
                f"{str(file)!r} does not exist; Squall reads tokenizers from tokenizer.json: save "
                "the tokenizer with transformers' save_pretrained, or name a file that has it"
            )
        first = read_json(folder / "special_tokens_map.json") or {}
        config = read_json(folder / "config.json") or {}
        inner = config.get("text_config")
        return cls(
            text,
            parse_json(text, file.name),
            first | (read_json(folder / "tokenizer_config.json") or {}),
            read_json(folder / "added_tokens.json") or {},
            (
                read_json(folder / "generation_config.json") or {},
                config,
                inner if isinstance(inner, dict) else {},
            ),
        )

    def ids(self, name: str) -> list[int]:
        """The ids that the model's configurations give for `name`."""
        return [i for config in self.model for i in token_ids(config.get(name))]


def _opened(files: _Files) -> tuple[Any, Vocabulary]:
    library = library_of(files.tokenizer)
    _repair(library, files)
    return library, _vocabulary(library, files)


def library_of(text: str) -> Any:
    """The tokenizer of the `tokenizers` library that a tokenizer.json describes."""
    try:
        library = Library.from_str(text)
        library.no_truncation()
        library.no_padding()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        raise InvalidCheckpoint(f"tokenizer.json: {error}") from None
    return library


def _repair(library: Any, files: _Files) -> None:
    """Add tokens that only the configurations have, and make those with a meaning special."""
    decoder = files.config.get("added_tokens_decoder")
    known: dict[int, tuple[str, dict[str, Any]]] = {
        i: (content, {}) for content, i in files.added.items() if type(i) is int
    }
    for key, value in decoder.items() if isinstance(decoder, dict) else ():
        named = token_text(value)
        if key.isdecimal() and len(key) < 10 and named is not None and isinstance(value, dict):
            known[int(key)] = (named, value)
    for i, (text, flags) in sorted(known.items()):
        if library.token_to_id(text) is not None:
            continue
        _add(library, text, flags)
        if library.token_to_id(text) != i:
            raise InvalidCheckpoint(
                f"the added token {text!r} should have id {i}, but tokenizer.json leaves "
                f"it {library.token_to_id(text)}; save the tokenizer again"
            )
    _mark_special(library, files)


def _add(library: Any, content: str, flags: Mapping[str, Any]) -> None:
    names = ("lstrip", "rstrip", "single_word", "normalized")
    given = {name: flags[name] for name in names if isinstance(flags.get(name), bool)}
    special = flags.get("special") is True
    token = AddedToken(content, special=special, **({"normalized": not special} | given))
    (library.add_special_tokens if special else library.add_tokens)([token])


def _mark_special(library: Any, files: _Files) -> None:
    vocabulary = library.get_vocab(with_added_tokens=True)
    extra = files.config.get("additional_special_tokens")
    texts: list[str | None] = [
        token_text(files.config.get(f"{name}_token")) for name in ("bos", "eos", "unk")
    ]
    texts += [token_text(value) for value in (extra if isinstance(extra, list) else ())]
    if (fill := find_fill(library.token_to_id)) is not None:
        texts += [library.id_to_token(i) for i in fill.tokens]
    # What stands for images.
    named = [i for name in ("image_token_id", "image_token_index") for i in files.ids(name)]
    texts += [library.id_to_token(i) for i in named]
    texts += [library.id_to_token(i) for i in stops(vocabulary.items(), _named(library, files))]
    added = {token.content: token for token in library.get_added_tokens_decoder().values()}
    for text in filter(None, texts):
        token = added.get(text)
        if text in vocabulary and not (token and token.special):
            strips = {"lstrip": token.lstrip, "rstrip": token.rstrip} if token else {}
            library.add_special_tokens([AddedToken(text, special=True, normalized=False, **strips)])


def _named(library: Any, files: _Files) -> list[int]:
    """The ids that the configurations call the end."""
    text = token_text(files.config.get("eos_token"))
    named = [library.token_to_id(text)] if text else []
    named += [i for i in files.ids("eos_token_id") if library.id_to_token(i) is not None]
    return [i for i in named if i is not None]


def _vocabulary(library: Any, files: _Files) -> Vocabulary:
    by_text: dict[str, int] = library.get_vocab(with_added_tokens=True)
    size = max(by_text.values(), default=-1) + 1
    if not 0 < size <= MAX_ID:
        raise InvalidCheckpoint(f"tokenizer.json has {size} tokens; 1 to {MAX_ID} are allowed")
    tokens, types = [""] * size, [1] * size
    for text, i in by_text.items():
        tokens[i] = text
    added = library.get_added_tokens_decoder()
    # One character, such as a "!" for padding, is text that people write.
    controls = {t.content for t in added.values() if t.special and len(t.content) > 1}
    for i, token in added.items():
        tokens[i], types[i] = token.content, USER_DEFINED
    for i in range(size):
        # Pieces may be there twice, and the map has one of them.
        tokens[i] = tokens[i] or library.id_to_token(i) or ""
        types[i] = CONTROL if tokens[i] in controls else types[i]
    named = _named(library, files)
    ends = stops(by_text.items(), named)
    bos, unknown = (_id_of(library, files, name) for name in ("bos", "unk"))
    if unknown is not None and unknown not in ends | {bos}:
        types[unknown] = UNKNOWN
    fill = find_fill(library.token_to_id)
    return Vocabulary(tokens, types, bos, next(iter(named), None), unknown, ends, fill)


def _id_of(library: Any, files: _Files, name: str) -> int | None:
    text = token_text(files.config.get(f"{name}_token"))
    found: int | None = library.token_to_id(text) if text else None
    ids = [i for i in files.ids(f"{name}_token_id") if library.id_to_token(i) is not None]
    return found if found is not None else next(iter(ids), None)


def _prefix(library: Any, files: _Files, bos: int | None) -> list[int]:
    """What comes before each text: BOS, or what the post-processor puts there."""
    wanted = files.config.get("add_bos_token")
    if isinstance(wanted, bool):
        return [bos] if wanted and bos is not None else []
    encoded = library.encode("a", add_special_tokens=True)
    count = next((n for n, of in enumerate(encoded.special_tokens_mask) if not of), 0)
    prefix: list[int] = encoded.ids[:count]
    return prefix


class _Codec:
    """Text without control tokens to ids, by the library; and ids to bytes, by its decoder."""

    space_after_control = False

    def __init__(self, library: Any, vocabulary: Vocabulary, spec: Mapping[str, Any]) -> None:
        self._first = library
        library.encode_special_tokens = True
        self._inner = _inner(library, spec)
        first_only = '"prepend_scheme": "first"' in json.dumps(spec.get("pre_tokenizer"))
        self._later = self._inner if first_only else library
        self._vocabulary = vocabulary
        self._controls = frozenset(vocabulary.of_type(CONTROL))
        self._decoding = _Decoding(spec.get("decoder"))
        self.space_suffix = "BPEDecoder" in self._decoding.kinds

    def encode(self, text: str, *, first: bool) -> list[int]:
        library = self._first if first else self._later
        ids = ids_of(library, text)
        if self._controls.isdisjoint(ids):
            return ids
        return self._without_controls(library, text)

    def _without_controls(self, library: Any, text: str) -> list[int]:
        """Cut inside of each word that is a control token, until there is none."""
        offsets = library.encode(text, add_special_tokens=False)
        done: list[int] = []
        parts = _cut(text, offsets, self._controls)
        for n, part in enumerate(parts):
            again = library if n == 0 else self._inner
            ids = ids_of(again, part)
            if self._controls.isdisjoint(ids):
                done += ids
            elif len(part) > 1 and len(parts) > 1:
                done += self._without_controls(again, part)
            else:  # a control token of one character, or one that is no longer in its own text
                done += [i for i in ids if i not in self._controls]
        return done

    def token_bytes(self, token: int, *, first: bool) -> bytes:
        """What a token stands for; added tokens go through the decoder as others do."""
        return self._decoding.bytes_of(self._vocabulary.tokens[token], first=first)


def _cut(text: str, encoded: Any, controls: frozenset[int]) -> list[str]:
    cuts = [
        span[0] + 1
        for i, span in zip(encoded.ids, encoded.offsets, strict=True)
        if i in controls and span[1] - span[0] > 1
    ]
    ends = [*cuts, len(text)]
    return [text[a:b] for a, b in zip([0, *cuts], ends, strict=True) if b > a]


def _inner(library: Any, spec: Mapping[str, Any]) -> Any:
    """The same vocabulary for the middle of a text, where no space is to be put before it."""
    changed = {name: _without_prefix(spec.get(name)) for name in ("normalizer", "pre_tokenizer")}
    if all(changed[name] == spec.get(name) for name in changed):
        return library
    empty = {"version": "1.0", "added_tokens": [], **changed, "model": _NOTHING}
    inner = library_of(json.dumps(empty))
    inner.model = library.model
    for _, token in sorted(library.get_added_tokens_decoder().items()):
        (inner.add_special_tokens if token.special else inner.add_tokens)([token])
    inner.encode_special_tokens = True
    return inner


_WITHOUT_PREFIX: Mapping[str, Mapping[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
}


def _without_prefix(step: Any) -> Any:
    if not isinstance(step, dict) or step.get("type") == "Prepend":
        return None
    if step.get("type") == "Sequence":
        (name, parts) = next((k, v) for k, v in step.items() if k != "type")
        kept = [changed for part in parts if (changed := _without_prefix(part)) is not None]
        return {**step, name: kept}
    return {**step, **_WITHOUT_PREFIX.get(str(step.get("type")), {})}


class _Decoding:
    """A decoder of tokenizer.json as what one token stands for, whatever is around it.

    Bytes are kept in texts as "surrogateescape" does, and become characters where texts are joined.
    """

    def __init__(self, decoder: Any) -> None:
        self._steps: list[_Step] = []
        self.kinds: list[str] = []
        for step in _flat(decoder):
            kind = str(step.get("type"))
            if kind not in _STEPS:
                known = ", ".join(sorted(_STEPS))
                raise UnsupportedModel(
                    f"tokenizer.json has the decoder {kind[:80]!r}; known: {known}"
                )
            self._steps.append(_STEPS[kind](step, "Fuse" in self.kinds))
            self.kinds.append(kind)

    def bytes_of(self, text: str, *, first: bool) -> bytes:
        """The bytes of a token; `first`: no text comes before it."""
        for step in self._steps:
            text = step(text, first)
        return text.encode("utf-8", "surrogateescape")


def _escaped(values: list[int], text: str) -> str:
    """The bytes `values`, or the text if it does not stand for bytes."""
    if not values or min(values) < 0:
        return text
    return bytes(values).decode("utf-8", "surrogateescape")


def _replace(step: Mapping[str, Any], _: bool) -> _Step:
    pattern, new = step.get("pattern"), step.get("content")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(old, str) or not old or not isinstance(new, str):
        raise UnsupportedModel("tokenizer.json: a Replace decoder must replace a string")
    return lambda text, _: text.replace(old, new)


def _metaspace(step: Mapping[str, Any], _: bool) -> _Step:
    space = str(step.get("replacement") or "\u2581")
    default = "always" if step.get("add_prefix_space", True) else "never"
    before = " " if step.get("prepend_scheme", default) == "never" else ""
    return lambda text, first: text.replace(space, before if first else " ")


def _strip(step: Mapping[str, Any], fused: bool) -> _Step:
    if (step.get("content"), step.get("start"), step.get("stop")) != (" ", 1, 0):
        raise UnsupportedModel("tokenizer.json: a Strip decoder must strip one leading space")
    return lambda text, first: text.removeprefix(" " if first or not fused else "")


def _suffix(step: Mapping[str, Any], _: bool) -> _Step:
    return lambda text, _: text.replace(str(step.get("suffix") or "</w>"), " ")


_STEPS: Mapping[str, Callable[[Mapping[str, Any], bool], _Step]] = {
    "ByteLevel": lambda *_: lambda text, _: _escaped([BYTE_OF.get(c, -1) for c in text], text),
    "ByteFallback": lambda *_: (
        lambda text, _: _escaped([int(byte, 16) for byte in _BYTE.findall(text)], text)
    ),
    "Replace": _replace,
    "Metaspace": _metaspace,
    "Strip": _strip,
    "BPEDecoder": _suffix,
    "Fuse": lambda *_: lambda text, _: text,
}


def _flat(decoder: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(decoder, dict):
        raise UnsupportedModel("tokenizer.json has no decoder, so its tokens have no text")
    if decoder.get("type") != "Sequence":
        yield decoder
        return
    for step in decoder.get("decoders") or ():
        yield from _flat(step)
