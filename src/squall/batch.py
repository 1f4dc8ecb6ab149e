"""What one step needs besides weights: plain int32 arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step, sequence after sequence.

    tokens, positions, slots: [rows]. A row's K and V go to slot = block * block_size + offset.
    bounds: [sequences + 1]. Rows `bounds[s]:bounds[s + 1]` belong to sequence s; their positions
        ascend by 1.
    block_tables: [sequences, blocks]. Block b of a sequence holds positions `b * block_size ...`.
    outputs: [outputs]. The rows whose logits are wanted.
    """

    tokens: Int32
    positions: Int32
    slots: Int32
    bounds: Int32
    block_tables: Int32
    outputs: Int32
