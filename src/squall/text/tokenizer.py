"""Text to token ids and back.

Control tokens (`<|im_end|>`, `</s>`) come from text only where the caller says so, so that a user's
message can never hold one. User-defined tokens are words like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

from squall.errors import InvalidCheckpoint, InvalidRequest, UnsupportedModel
from squall.text.bytelevel import ByteLevel
from squall.text.pieces import SentencePiece
from squall.text.vocabulary import CONTROL, UNKNOWN, Vocabulary, literals


class Piece(NamedTuple):
    """A part of a prompt; control tokens are read in it unless it is message `content`."""

    text: str
    content: bool = False


class Codec(Protocol):
    """One kind of vocabulary: text without control tokens to ids, and ids to bytes."""

    space_after_control: bool  # text after a control token begins like the first
    space_suffix: bool  # text ends with a space that was not written

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of text that holds no control token; `first`: nothing is before it."""

    def token_bytes(self, token: int, *, first: bool) -> bytes:
        """What a token stands for; `first`: as the first of a text."""


_MOST_CHARACTERS = 32  # of a token, where only so many tokens are wanted
_RARE = "\N{WHITE SMILING FACE}"  # no piece has it together with others
CODECS: dict[str, type[ByteLevel] | type[SentencePiece]] = {
    "gpt2": ByteLevel,
    "llama": SentencePiece,
}


class Tokenizer:
    """Encodes and decodes; immutable but for caches, and safe to share between threads."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        codec: Codec,
        *,
        prefix: Sequence[int],
        lstrip: frozenset[int] = frozenset(),
        rstrip: frozenset[int] = frozenset(),
    ) -> None:
        """`prefix` comes before texts; `lstrip`, `rstrip`: ids that swallow white space there."""
        self.bos = vocabulary.bos
        self.eos = vocabulary.eos
        self.stop_ids = vocabulary.stops
        self.filling = vocabulary.fill
        self.tokens = vocabulary.tokens
        self.vocab_size = len(vocabulary.tokens)
        self.space_after_control = codec.space_after_control
        self.space_suffix = codec.space_suffix
        self._codec = codec
        self._prefix = list(prefix)
        self._lstrip = lstrip
        self._rstrip = rstrip
        special = vocabulary.of_type(CONTROL, UNKNOWN)
        self._special = frozenset(special)
        self.controls = {vocabulary.tokens[i]: i for i in special}
        self._control_pattern = literals(self.controls)
        self._bytes: dict[tuple[int, bool], bytes] = {}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that `tokenizer.ggml.*` describes; `llama` and `gpt2` vocabularies."""
        model = metadata.get("tokenizer.ggml.model")
        if model is None:
            raise InvalidCheckpoint("the GGUF file has no tokenizer.ggml.model; convert it again")
        if model not in CODECS:
            known = ", ".join(sorted(CODECS))
            raise UnsupportedModel(f"unknown tokenizer.ggml.model {model!r}; known: {known}")
        vocabulary = Vocabulary.from_gguf(metadata)
        codec = CODECS[model](vocabulary, metadata)
        bos = vocabulary.bos
        add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", codec.add_bos))
        # GGUF does not say it, but Phi-3's control tokens swallow the white space after them.
        name = str(metadata.get("general.name", "")).lower()
        controls = vocabulary.of_type(CONTROL, UNKNOWN) if re.search("phi-?3", name) else ()
        return cls(
            vocabulary,
            codec,
            prefix=[bos] if add_bos and bos is not None else [],
            rstrip=frozenset(controls) - {bos, vocabulary.eos},
        )

    def encode(self, text: str, *, add_bos: bool = True, specials: bool = False) -> list[int]:
        """Ids of `text`; `specials`: control tokens in it are read as such.

        BOS comes first if the model wants one, `add_bos` allows it, and the text brings none.
        """
        return self.encode_pieces([Piece(text, content=not specials)], add_bos=add_bos)

    def encode_fill(
        self, prefix: str, suffix: str, files: Sequence[tuple[str, str]] = (), most: int = 0
    ) -> list[int]:
        """Ids that ask for what is between two texts, in which no control token is read.

        files: names and texts that come before, as far as there is room in `most` ids.
        """
        if self.filling is None:
            raise InvalidRequest(
                "suffix is not for this model, which has no tokens to fill in with; leave it out"
            )
        if self.space_after_control:  # which is before a text, and not in its middle
            mark = len(self._encode_run([_RARE], []))
            after = self._encode_run([_RARE, suffix], [])[mark:]
        else:
            after = self._encode_run([suffix], [-1])
        ids = self.filling.prompt(self._encode_run([prefix], []), after)
        room = most - len(ids) - len(self._prefix)
        return self._prefix + (self._encode_files(files, room) if files else []) + ids

    def _encode_files(self, files: Sequence[tuple[str, str]], most: int) -> list[int]:
        """At most so many ids that show files; the last ones, where not all have room."""
        repository, file = (self.filling.files if self.filling else ()) or (None, None)
        ids: list[int] = []
        for name, text in reversed([*files, ("file", "")] if file else files):
            if len(ids) < most:
                text = text[-_MOST_CHARACTERS * most :]
                mark = [] if file is None else [file, *self._encode_run([f"{name}\n"], [-1])]
                ids = [*mark, *self._encode_run([text], [-1]), *ids]
        if repository is not None:
            ids = [repository, *self._encode_run(["project\n"], [-1]), *ids]
        return ids[max(0, len(ids) - most) :]

    def asks_to_fill(self, text: str) -> bool:
        """Whether a text has the tokens to fill in with, each once, as clients write them."""
        names = [self.tokens[i] for i in self.filling.tokens] if self.filling else [""]
        return all(name in self.controls and text.count(name) == 1 for name in names)

    def encode_pieces(self, pieces: Iterable[Piece], *, add_bos: bool = True) -> list[int]:
        """Ids of the joined pieces; tokens may span pieces, except for control tokens."""
        ids: list[int] = []
        run: list[str] = []
        for text, content in pieces:
            for n, part in enumerate([text] if content else self._control_pattern.split(text)):
                if n % 2 == 0:
                    run.append(part)
                    continue
                token = self.controls[part]
                ids += self._encode_run(run, ids, strip=token in self._lstrip)
                ids.append(token)
                run = []
        ids += self._encode_run(run, ids)
        if add_bos and ids[: len(self._prefix)] != self._prefix:
            ids[:0] = self._prefix
        return ids

    def _encode_run(self, run: list[str], before: list[int], *, strip: bool = False) -> list[int]:
        text = "".join(run)
        if before and before[-1] in self._rstrip:
            text = text.lstrip()
        if strip:
            text = text.rstrip()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text has half a surrogate pair at character {error.start}; send valid Unicode"
            ) from None
        return self._codec.encode(text, first=not before) if text else []

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        parts: list[bytes] = []
        first = True
        for token in ids:
            special = token in self._special
            if not (special and skip_specials):
                parts.append(self.token_bytes(token, first=first))
                first = False
            first = first or (special and self.space_after_control)
        if parts and self.space_suffix:
            parts[-1] = parts[-1].removesuffix(b" ")
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token: int, *, first: bool = False) -> bytes:
        """The bytes a token stands for, `first` in a text or later; a control token's name."""
        found = self._bytes.get((token, first))
        if found is None:
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(f"token id {token} is outside 0..{self.vocab_size - 1}")
            found = self._bytes[token, first] = self._codec.token_bytes(token, first=first)
        return found

    def differs(self, other: Tokenizer) -> int | None:
        """The first id that means another thing there; None: they are the same, but for padding."""
        known = []
        for one in (self, other):
            named = [one._codec.token_bytes(i, first=False) for i in range(one.vocab_size)]
            while named and named[-1] == b"[PAD%d]" % (len(named) - 1):
                named.pop()
            known.append([(name, one.is_special(i)) for i, name in enumerate(named)])
        pairs = enumerate(zip_longest(*known))
        return next((i for i, (here, there) in pairs if here != there), None)

    def is_special(self, token: int) -> bool:
        """Whether a token is a control token (or the unknown token): structure, not text."""
        return token in self._special
