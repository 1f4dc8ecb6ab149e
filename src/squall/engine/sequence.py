"""The tokens of one request, how far they are computed, and parts of them as a step."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from squall.batch import Batch, Mixture
from squall.engine.request import Request, Span


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens of a request, guesses of what follows, and where they are in the KV cache.

    The scheduler owns it. tokens: the prompt, with its spans, and what was drawn. prompt: how many
        are the prompt's. computed: how many are in the KV cache. guesses: what the next step
        verifies.
    scored: the first token whose logits are wanted and not told: the last one, but for scoring.
    blocks: KV blocks, in order; while it runs, all tokens have room, and guesses in their step.
    keys: of the leading full blocks, as far as known. stored: how many of them are cached.
    """

    request: Request
    number: int
    tokens: list[int]
    scored: int
    spans: tuple[Span, ...] = ()
    prompt: int = field(init=False)
    guesses: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    stored: int = 0

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens known and not computed."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens and guesses `start:stop` of a sequence; of `outputs` logits are wanted."""

    of: Sequence
    start: int
    stop: int
    outputs: range

    @property
    def due(self) -> bool:
        """Whether it tells the logits after the last known token, so that the next can be drawn."""
        return self.outputs.stop == self.stop >= len(self.of.tokens)


def batch_of(chunks: Collection[Chunk], vocab: int) -> Batch:
    """A step that computes them. Ids that a model of `vocab` does not have become its last."""
    tokens: list[int] = []
    positions: list[int] = []
    bounds, outputs = [0], []
    width = max(len(chunk.of.blocks) for chunk in chunks)
    tables = np.zeros((len(chunks), width), np.int32)
    mixtures: dict[Mixture, int] = {}
    mixture: list[int] = []
    for i, chunk in enumerate(chunks):
        adapters = chunk.of.request.adapters
        chosen = mixtures.setdefault(adapters, len(mixtures)) if adapters else -1
        mixture += [chosen] * (chunk.stop - chunk.start)
        blocks, span = chunk.of.blocks, range(chunk.start, chunk.stop)
        outputs += [len(tokens) + output - chunk.start for output in chunk.outputs]
        tokens += chunk.of.tokens[chunk.start : chunk.stop]
        known = len(chunk.of.tokens)
        tokens += chunk.of.guesses[max(chunk.start - known, 0) : max(chunk.stop - known, 0)]
        positions += span
        bounds.append(len(tokens))
        tables[i, : len(blocks)] = blocks
    return Batch(
        tokens=np.minimum(np.array(tokens, np.int32), vocab - 1),
        positions=np.array(positions, np.int32),
        bounds=np.array(bounds, np.int32),
        block_tables=tables,
        outputs=np.array(outputs, np.int32),
        mixture=np.array(mixture, np.int32) if mixtures else None,
        mixtures=tuple(mixtures),
        prompts=np.array([chunk.of.prompt for chunk in chunks], np.int32),
    )
