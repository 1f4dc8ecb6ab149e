"""An embedder made up: a text's vector is drawn from its characters, and so is its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from squall.errors import ContextLengthExceeded, InvalidRequest

Floats = NDArray[np.float32]


class Embeddings(NamedTuple):
    vectors: Floats
    tokens: int


class Scores(NamedTuple):
    scores: Floats
    tokens: int


@dataclass
class MadeUpEmbedder:
    """A token is a character. calls: how many texts each call had."""

    width: int = 8
    context: int = 64
    reranks: bool = False
    path: Path = Path("made-up")
    name: str = "made-up"
    formats: tuple[Any, ...] = ()
    calls: list[int] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.go.set()

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, prompt: str | None = None,
        dimensions: int | None = None, normalize: bool = True, truncate: bool = False,
    ) -> Embeddings:  # fmt: skip
        self.go.wait()
        self.calls.append(len(texts))
        if dimensions is not None and not 1 <= dimensions <= self.width:
            raise InvalidRequest(f"dimensions is {dimensions}; it must be in 1..{self.width}")
        read = [(prompt or "") + t if isinstance(t, str) else "".join(map(chr, t)) for t in texts]
        for i, text in enumerate(read):
            if len(text) > self.context and not truncate:
                raise ContextLengthExceeded(
                    f"text {i} has {len(text)} tokens, and this model reads {self.context}"
                )
        read = [text[: self.context] for text in read]
        found = np.stack([self.vector(text) for text in read])[:, :dimensions]
        if normalize:
            found /= np.linalg.norm(found, axis=1, keepdims=True)
        return Embeddings(found, sum(map(len, read)))

    def rerank(self, query: str, documents: Sequence[str], *, truncate: bool = False) -> Scores:
        """The share of the query's letters that a document has."""
        self.embed([query, *documents], truncate=truncate)
        scores = [len({*query} & {*text}) / len({*query}) for text in documents]
        return Scores(np.array(scores, np.float32), len("".join([query, *documents])))

    def vector(self, text: str) -> Floats:
        draw = np.random.default_rng([*map(ord, text)])
        return draw.standard_normal(self.width).astype(np.float32)

    def count(self, text: str) -> int:
        return len(text)

    def close(self) -> None:
        pass
