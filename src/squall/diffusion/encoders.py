"""Encoders of texts -> programs: ids of tokens in, a row for each of them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from squall import program as p
from squall.blocks import Blocks, Reach
from squall.roles import roles
from squall.spec import Encoder, Relative

Int32 = NDArray[np.int32]
TOKENS, SPANS, POSITIONS = p.Index("tokens"), p.Index("spans", axes=2), p.Index("positions")
# The output, [tokens, hidden].
STATES = "states"


def compile(spec: Encoder, names: p.Names) -> p.Program:
    b = Blocks(names, roles(spec), POSITIONS, prefix="encoder.")
    x = _embedded(b, "embed", TOKENS)
    if spec.positions:
        placed, learned = b.builder.value("placed", x.width), _embedded(b, "positions", POSITIONS)
        x = b.builder.emit(p.Add(placed, x, learned))
    reach = Reach(SPANS)
    if spec.relative is not None:
        relative = b.vector("relative.weight")
        reach = Reach(SPANS, relative=relative, buckets=buckets(spec.relative))
    for index, layer in enumerate(spec.layers):
        x = b.layer(x, f"layers.{index}", layer, reach)
    return b.builder.build(b.norm(x, "norm", spec.norm, out=STATES))


def _embedded(b: Blocks, role: str, index: p.Index) -> p.Value:
    table = b.matrix(role)
    return b.builder.emit(p.Embed(b.builder.value(role, table.cols), index, table))


def buckets(relative: Relative) -> tuple[int, ...]:
    """The bucket of a key's position less its query's, from -farthest to farthest.

    In float32, as models are trained with: where one bucket ends, its roundings decide.
    """
    half, near = relative.buckets // 2, relative.buckets // 4
    apart = np.arange(relative.farthest + 1)
    ratio = np.log(np.maximum(apart, near).astype(np.float32) / np.float32(near))
    share = ratio / np.float32(np.log(relative.farthest / near))
    far = near + (share * np.float32(half - near)).astype(np.int64)
    found = np.where(apart < near, apart, np.minimum(far, half - 1)).tolist()
    return (*reversed(found[1:]), *found[:1], *(half + bucket for bucket in found[1:]))


def inputs(spec: Encoder, ids: Sequence[int], *, causal: bool) -> dict[str, Int32]:
    """What a run is given. causal: a token sees those before it, not all."""
    positions = np.arange(len(ids), dtype=np.int32)
    ends = positions + 1 if causal else np.full_like(positions, len(ids))
    made = {"tokens": np.array(ids, np.int32), "spans": np.stack([np.zeros_like(ends), ends])}
    return made | ({"positions": positions} if spec.positions else {})
