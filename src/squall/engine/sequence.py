"""The tokens of one request, how far they are computed, and parts of them as a step."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.batch import Batch, Memory, Mixture
from squall.engine.request import Request, Span


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens of a request, guesses of what follows, and where they are in the KV cache.

    The scheduler owns it. tokens: the prompt, with its spans and rotary positions, and what was
        drawn. prompt: how many are the prompt's. computed: how many are in the KV cache.
    guesses: what the next step verifies.
    scored: the first token whose logits are wanted and not told: the last one, but for scoring.
    blocks: KV blocks, in order; while it runs, all tokens have room, and guesses in their step.
    keys: of the leading full blocks, as far as known. stored: how many of them are cached.
    """

    request: Request
    number: int
    tokens: list[int]
    scored: int
    spans: tuple[Span, ...] = ()
    rotary: NDArray[np.int32] | None = None
    prompt: int = field(init=False)
    sees: bool = field(init=False)
    guesses: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    stored: int = 0

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        shown = any(span.rows is not None or span.mutual for span in self.spans)
        self.sees = shown or self.request.recalled is not None

    @property
    def pending(self) -> int:
        """Tokens known and not computed."""
        return len(self.tokens) - self.computed

    def turned(self, start: int, stop: int) -> NDArray[np.int32]:
        """Rotary positions of tokens; those of an answer go on after all of the prompt's."""
        if self.rotary is None:
            return np.arange(start, stop, dtype=np.int32)
        later = int(self.rotary.max()) + 1 + np.arange(stop - self.prompt, dtype=np.int32)
        known = self.rotary[:, start:stop]
        rest = later[max(start - self.prompt, 0) :]
        return np.concatenate([known, np.tile(rest, (len(known), 1))], axis=1)


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


def batch_of(chunks: Collection[Chunk], ids: int, *, plain: bool = False) -> Batch:
    """A step that computes them. Ids that a model of so many does not have become its last.

    plain: without adapters and images, which are another model's.
    """
    tokens: list[int] = []
    positions: list[int] = []
    bounds, outputs = [0], []
    width = max(len(chunk.of.blocks) for chunk in chunks)
    tables = np.zeros((len(chunks), width), np.int32)
    mixtures: dict[Mixture, int] = {}
    mixture: list[int] = []
    for i, chunk in enumerate(chunks):
        adapters = () if plain else chunk.of.request.adapters
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
    sees = not plain and any(chunk.of.sees for chunk in chunks)
    return Batch(
        tokens=np.minimum(np.array(tokens, np.int32), ids - 1),
        positions=np.array(positions, np.int32),
        bounds=np.array(bounds, np.int32),
        block_tables=tables,
        outputs=np.array(outputs, np.int32),
        mixture=np.array(mixture, np.int32) if mixtures else None,
        mixtures=tuple(mixtures),
        prompts=np.array([chunk.of.prompt for chunk in chunks], np.int32),
        **(_seeing(chunks, bounds, positions) if sees else {}),
    )


def _seeing(chunks: Collection[Chunk], bounds: list[int], positions: list[int]) -> dict[str, Any]:
    """What images of some of the sequences mean for a batch."""
    spans = np.zeros((2, len(positions)), np.int32)
    np.add(positions, 1, out=spans[1])
    overlay, images = np.full(len(positions), -1, np.int32), []
    count = 0
    for chunk, first in zip(chunks, bounds, strict=False):
        for span in chunk.of.spans:
            start, stop = max(span.start, chunk.start), min(span.stop, chunk.stop)
            if start >= stop:
                continue
            at = slice(first + start - chunk.start, first + stop - chunk.start)
            if span.mutual:
                spans[1, at] = span.stop
            if span.rows is not None:
                images.append(span.rows[start - span.start : stop - span.start])
                overlay[at] = np.arange(count, count + stop - start)
                count += stop - start
    return {
        "spans": spans,
        "overlay": overlay,
        "images": np.concatenate(images) if images else None,
        "rotary": _rotary(chunks),
        **_recalling(chunks, bounds),
    }


def _rotary(chunks: Collection[Chunk]) -> NDArray[np.int32] | None:
    axes = [len(chunk.of.rotary) for chunk in chunks if chunk.of.rotary is not None]
    if not axes:
        return None
    turned = (chunk.of.turned(chunk.start, chunk.stop) for chunk in chunks)
    each = [found if found.ndim > 1 else np.tile(found, (axes[0], 1)) for found in turned]
    return np.ascontiguousarray(np.concatenate(each, axis=1))


def _recalling(chunks: Collection[Chunk], bounds: list[int]) -> dict[str, Any]:
    seen = np.zeros((3, bounds[-1]), np.int32)
    memories: list[Memory | None] = []
    for chunk, first in zip(chunks, bounds, strict=False):
        recalled = chunk.of.request.recalled
        memories.append(recalled.memory if recalled else None)
        if recalled is not None:
            skipped = recalled.seen.shape[1] - chunk.of.prompt
            at = np.arange(chunk.start, chunk.stop).clip(max=chunk.of.prompt - 1) + skipped
            seen[:, first : first + len(at)] = recalled.seen[:, at]
    return {"seen": seen, "memories": tuple(memories)} if any(memories) else {}
