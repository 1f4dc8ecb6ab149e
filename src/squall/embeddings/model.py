"""A model that embeds texts, or judges how well they answer a query, open and ready."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.hub import name_of
from squall.closing import Closing
from squall.embeddings.assembly import Parts, assemble
from squall.embeddings.tokens import Text
from squall.errors import ContextLengthExceeded, EngineStopped, InvalidRequest
from squall.executors import ThreadPool
from squall.opening import Opening, one_by_one
from squall.quant import FormatTotal

Floats = NDArray[np.float32]
MOST_TEXTS = 1 << 16
_QUERIES, _DOCUMENTS = ("query",), ("document", "passage")


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """vectors: float32 [texts, width]. tokens: of all texts."""

    vectors: Floats
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """scores: float32 [documents], in their order; more is better. tokens: of all that was read."""

    scores: Floats
    tokens: int


def _open(cls: type[Embedder], opening: Opening) -> Embedder:
    return cls.open_with(opening)


class Embedder(Closing):
    """A model that embeds texts. Make one with `Embedder.open`; any thread may call it.

    A text's vector is the same bytes alone and in any batch, on any number of threads.

    path: what was opened. width: of a vector. context: tokens that a text may have.
    reranks: it judges pairs, and has scores of its own.
    """

    def __init__(self, parts: Parts) -> None:
        self.path: Path = parts.path
        self.width, self.context, self.reranks = parts.width, parts.context, parts.reranks
        self._parts: Parts | None = parts
        self._process = os.getpid()

    @classmethod
    def open_with(cls, opening: Opening, pool: ThreadPool | None = None) -> Embedder:
        """Open what is described; `open` takes the options themselves.

        pool: threads to share with others; what other models do on it goes first.
        """
        return cls(assemble(opening, pool))

    open = classmethod(one_by_one(Opening, _open))

    @property
    def name(self) -> str:
        return name_of(self.path)

    @property
    def formats(self) -> tuple[FormatTotal, ...]:
        """What the matrices are in memory: number formats, with counts and bytes."""
        return self._open.formats

    def count(self, text: str) -> int:
        """Tokens of a text, with those that the model has around it."""
        parts = self._open
        return len(parts.tokens.texts(parts.tokens.bodies([_text(text, 0)]), None)[0].ids)

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, prompt: str | None = None,
        dimensions: int | None = None, normalize: bool = True, truncate: bool = False,
    ) -> Embeddings:  # fmt: skip
        """A vector of each text, or of ids of tokens, which are read as they are.

        prompt: a text to put before each, or the name of one of the model's; by default the
        model's own. dimensions: only so many first values, as models trained for it allow.
        normalize: to length 1. truncate: cut texts that are too long, instead of refusing them.
        """
        parts, said = self._open, self._open.setup
        if self.reranks:
            raise InvalidRequest(f"{self.name} judges pairs and embeds no texts; call rerank")
        if dimensions is not None and not 1 <= dimensions <= self.width:
            raise InvalidRequest(f"dimensions is {dimensions}; it must be in 1..{self.width}")
        given = _several(texts, "texts")
        before = said.prompts.get(prompt, prompt) if prompt is not None else said.prompt
        written = [before + _text(t, i) for i, t in enumerate(given) if not _is_ids(t)]
        bodies = iter(parts.tokens.texts(
            parts.tokens.bodies(written), self.context if truncate else None
        ))  # fmt: skip
        read = [self._ids(t, i, truncate) if _is_ids(t) else next(bodies)
                for i, t in enumerate(given)]  # fmt: skip
        self._check(read, "text")
        width = dimensions or self.width
        vectors = np.empty((len(read), width), np.float32)
        for at, vector in enumerate(parts.vectors(read)):
            vectors[at] = _normal(vector[:width]) if normalize else vector[:width]
        return Embeddings(vectors, sum(len(text.ids) for text in read))

    def rerank(self, query: str, documents: Sequence[str], *, truncate: bool = False) -> Scores:
        """How well each document answers the query.

        Scores are those that sentence-transformers' CrossEncoder gives, or a reranker's probability
        of yes; of a model that embeds, cosines. truncate: see `embed`.
        """
        parts = self._open
        given = [_text(text, i) for i, text in enumerate(_several(documents, "documents"))]
        if not self.reranks:
            return self._cosines(query, given, truncate=truncate)
        limit = self.context if truncate else None
        pairs = parts.pairs(_text(query, 0), given, limit)
        self._check(pairs, "document")
        scores = [parts.score(logits) for logits in parts.vectors(pairs)]
        tokens = sum(len(pair.ids) for pair in pairs)
        return Scores(np.array(scores, np.float32), tokens)

    def close(self) -> None:
        """Free the model; calls that have begun end first."""
        self._parts = None

    @property
    def _open(self) -> Parts:
        if self._process != os.getpid():
            raise EngineStopped(
                "this process was forked after the model was opened; open it again here"
            )
        if self._parts is None:
            raise EngineStopped("the model is closed; open it again")
        return self._parts

    def _cosines(self, query: str, documents: Sequence[str], *, truncate: bool) -> Scores:
        known = self._open.setup.prompts
        asked, told = (
            next((name for name in names if name in known), None)
            for names in (_QUERIES, _DOCUMENTS)
        )
        one = self.embed([query], prompt=asked, truncate=truncate)
        others = self.embed(documents, prompt=told, truncate=truncate)
        scores = [np.add.reduce(one.vectors[0] * other) for other in others.vectors]
        return Scores(np.array(scores, np.float32), one.tokens + others.tokens)

    def _ids(self, text: object, at: int, truncate: bool) -> Text:
        assert isinstance(text, Sequence)
        ids, known = list(text), self._open.ids
        wrong = [i for i in ids if type(i) is not int or not 0 <= i < known]
        if wrong:
            raise InvalidRequest(
                f"text {at} has the token {wrong[0]!r:.99}; ids are whole numbers in 0..{known - 1}"
            )
        cut = ids[: self.context] if truncate else ids
        return Text(np.array(cut, np.int32), len(cut))

    def _check(self, texts: Iterable[Text], what: str) -> None:
        for at, text in enumerate(texts):
            if not len(text.ids):
                raise InvalidRequest(f"{what} {at} is empty; this model reads at least one token")
            if len(text.ids) > self.context:
                raise ContextLengthExceeded(
                    f"{what} {at} has {len(text.ids)} tokens, and this model reads {self.context}; "
                    "shorten it, or have it cut with truncate"
                )


def _several(given: object, what: str) -> Sequence[object]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InvalidRequest(f"{what} is {type(given).__name__}; it must be a list of texts")
    if len(given) > MOST_TEXTS:
        raise InvalidRequest(
            f"there are {len(given)} {what}; at most {MOST_TEXTS} may be in a call"
        )
    return given


def _is_ids(text: object) -> bool:
    return isinstance(text, Sequence) and not isinstance(text, str)


def _text(text: object, at: int) -> str:
    if not isinstance(text, str):
        raise InvalidRequest(f"text {at} is {text!r:.99}; it must be a string")
    return text


def _normal(vector: Floats) -> Floats:
    length = math.sqrt(float(np.add.reduce(np.square(vector, dtype=np.float64))))
    return vector / np.float32(max(length, 1e-12))
