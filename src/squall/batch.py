"""What one step needs besides weights: plain arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall.program import Index, Value

Int32 = NDArray[np.int32]
Mixture = tuple[tuple[object, float], ...]
"""Adapters of an executor, each with its weight, in the order in which they are added."""

Memory = object
"""What one sequence may recall, made by an executor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Rows of cached attention, sequence after sequence.

    positions: [rows]. The place of a row's K and V in its sequence.
    bounds: [sequences + 1]. Rows `bounds[s]:bounds[s + 1]` belong to sequence s; their positions
        ascend by 1.
    block_tables: [sequences, blocks]. Block b of a sequence holds positions `b * block_size ...`.
    memories: what each sequence may recall, made by the executor; empty: nothing.
    """

    positions: Int32
    bounds: Int32
    block_tables: Int32
    memories: tuple[Memory | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Sequences):
    """A step of a decoder.

    tokens: [rows]. outputs: [outputs]. The rows whose logits are wanted.
    spans: [2, rows]. The first position that a row sees, and one past the last; by default it sees
        itself and what is before it.
    rotary: [axes, rows]. Positions for the rotary embedding, by default the same.
    images: float32 [image rows, hidden]. overlay: [rows]. Which of those stands in place of a
        token's embedding; negative: none. Both for programs that ask, by default nothing.
    seen: [3, rows]. The first row of its sequence's memory that a row sees, one past the last, and
        whether those are of an image before it; if 0, the row sees all, and makes little of it.
    mixture: [rows]. Which of the `mixtures` each row has; negative: none, which is the default.
    prompts: [sequences]. How many tokens of a sequence are its prompt.
    """

    tokens: Int32
    outputs: Int32
    spans: Int32 | None = None
    rotary: Int32 | None = None
    images: NDArray[np.float32] | None = None
    overlay: Int32 | None = None
    seen: Int32 | None = None
    mixture: Int32 | None = None
    mixtures: tuple[Mixture, ...] = ()
    prompts: Int32 | None = None

    def inputs(
        self, indices: Iterable[Index], values: Iterable[Value] = ()
    ) -> dict[str, NDArray[np.generic]]:
        """What a run of a decoder's program is given, by name: these indices, and rows of images.

        values: the program's inputs.
        """
        wanted = {index.name: index for index in indices}
        spans, rows = self.spans, len(self.positions)
        if spans is None:
            spans = np.zeros((2, rows), np.int32)
            np.add(self.positions, 1, out=spans[1])
        rotary = self.positions if self.rotary is None else self.rotary
        if "rotary" in wanted and rotary.ndim < 2 and wanted["rotary"].axes > 1:
            rotary = np.tile(rotary, (wanted["rotary"].axes, 1))
        mixture = self._or(self.mixture, -1)
        given: dict[str, NDArray[np.generic]] = {
            "tokens": self.tokens, "rotary": rotary, "spans": spans, "outputs": self.outputs,
            "mixture": mixture, "mixture.outputs": mixture[self.outputs],
        }  # fmt: skip
        if "shared" in wanted:
            given["shared"] = self._shared()
        for value in values:
            if value.name == "images":
                none = np.empty((0, value.width), np.float32)
                given["images"] = none if self.images is None else self.images
                given["overlay"] = self._or(self.overlay, -1)
        if "seen" in wanted:
            seen = np.zeros((3, rows), np.int32) if self.seen is None else self.seen
            told = {"told": _own(seen[2]), "told.outputs": _own(seen[2, self.outputs])}
            given |= {"seen": seen[:2], **told}
        return given

    def _or(self, given: Int32 | None, value: int) -> Int32:
        return np.full(len(self.positions), value, np.int32) if given is None else given

    def _shared(self) -> Int32:
        """Of each row the first of its prompt that is in this step; of an answer's, itself."""
        shared = np.arange(len(self.positions), dtype=np.int32)
        if self.prompts is None:
            return shared
        rows = np.diff(self.bounds)
        firsts, prompts = np.repeat(self.bounds[:-1], rows), np.repeat(self.prompts, rows)
        return np.where(self.positions < prompts, firsts, shared)


def _own(marks: Int32) -> Int32:
    """Of each row itself if it is marked, else -1."""
    return np.where(marks, np.arange(len(marks)), -1).astype(np.int32)
