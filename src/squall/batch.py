"""What one step needs besides weights: plain int32 arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Mixture = tuple[tuple[object, float], ...]
"""Adapters of an executor, each with its weight, in the order in which they are added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Rows of cached attention, sequence after sequence.

    positions: [rows]. The place of a row's K and V in its sequence.
    bounds: [sequences + 1]. Rows `bounds[s]:bounds[s + 1]` belong to sequence s; their positions
        ascend by 1.
    block_tables: [sequences, blocks]. Block b of a sequence holds positions `b * block_size ...`.
    memories: what each sequence has to recall, of an executor; None: nothing. Empty: none has any.
    """

    positions: Int32
    bounds: Int32
    block_tables: Int32
    memories: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Sequences):
    """A step of a decoder.

    tokens: [rows]. outputs: [outputs]. The rows whose logits are wanted.
    spans: [2, rows]. The first position that a row sees, and one past the last; by default it sees
        itself and what is before it.
    rotary: [axes, rows]. Positions for the rotary embedding, by default the same.
    mixture: [rows]. Which of the `mixtures` each row has; negative: none, which is the default.
    prompts: [sequences]. How many tokens of a sequence are its prompt.
    """

    tokens: Int32
    outputs: Int32
    spans: Int32 | None = None
    rotary: Int32 | None = None
    mixture: Int32 | None = None
    mixtures: tuple[Mixture, ...] = ()
    prompts: Int32 | None = None

    def indices(self, *, shared: bool = False) -> dict[str, Int32]:
        """What a run of the decoder's program is given, by name.

        shared: also which rows choose experts together, for a program that asks.
        """
        spans = self.spans
        if spans is None:
            spans = np.zeros((2, len(self.positions)), np.int32)
            np.add(self.positions, 1, out=spans[1])
        rotary = self.positions if self.rotary is None else self.rotary
        mixture = self.mixture
        if mixture is None:
            mixture = np.full(len(self.positions), -1, np.int32)
        given = {
            "tokens": self.tokens, "rotary": rotary, "spans": spans, "outputs": self.outputs,
            "mixture": mixture, "mixture.outputs": mixture[self.outputs],
        }  # fmt: skip
        return given | {"shared": self._shared()} if shared else given

    def _shared(self) -> Int32:
        """Of each row the first of its prompt that is in this step; of an answer's, itself."""
        shared = np.arange(len(self.positions), dtype=np.int32)
        if self.prompts is None:
            return shared
        rows = np.diff(self.bounds)
        firsts, prompts = np.repeat(self.bounds[:-1], rows), np.repeat(self.prompts, rows)
        return np.where(self.positions < prompts, firsts, shared)
