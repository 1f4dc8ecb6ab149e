"""Random valid blocks of every format."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.quant import Format

ZERO_SCALES = 0.1


def random_blocks(format: Format, rng: np.random.Generator, blocks: int) -> NDArray[np.uint8]:
    """`blocks` blocks, uint8: codes of all values, finite scales of both signs, some of them 0."""
    if format.layout.names is None:
        return format.quantize(rng.standard_normal(blocks, np.float32))
    data = rng.integers(0, 256, blocks * format.block_bytes, np.uint8)
    view = data.view(format.layout)
    for name in ("scale", "minimum"):
        if name in format.layout.names:
            view[name] = random_scales(rng, blocks)
    if "zero" in format.layout.names:  # of formats such as int4_g128
        view["zero"] = rng.integers(0, 1 << int(format.name[3]), blocks)
    _fill_sums(view)
    return data


def random_scales(rng: np.random.Generator, blocks: int) -> NDArray[np.float32]:
    scales = rng.uniform(0.001, 0.05, blocks) * rng.choice([-1.0, 1.0], blocks)
    scales[rng.random(blocks) < ZERO_SCALES] = 0.0
    return scales.astype(np.float32)


def _fill_sums(view: NDArray[Any]) -> None:
    """The redundant sums of q8_1 and q8_k, as ggml's quantizers write them."""
    names = view.dtype.names or ()
    if "sum" in names:
        view["sum"] = view["scale"] * view["codes"].sum(axis=1, dtype=np.float32)
    if "sums" in names:
        view["sums"] = view["codes"].reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)
