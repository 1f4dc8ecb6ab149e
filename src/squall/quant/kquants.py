"""ggml's formats with blocks of 256 values: q2_k q3_k q4_k q5_k q6_k q8_k.

The field order of each dtype is ggml's public block layout. A block is cut into groups of 16 or 32
values. A group has a small integer scale (and minimum); the block's `scale` (and `minimum`) turn
these into floats:

    q2_k q4_k q5_k    (scale * group_scale) * code - (minimum * group_minimum)
    q3_k q6_k         (scale * group_scale) * (code - middle)
    q8_k              scale * code

Wide codes are split over two fields, low bits in `codes`, the rest in `high`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.quant.bits import unpack
from squall.quant.format import Format

_HALF_SCALE = ("scale", "<f2")
_HALF_MINIMUM = ("minimum", "<f2")

_Q2_K = np.dtype([("groups", "u1", 16), ("codes", "u1", 64), _HALF_SCALE, _HALF_MINIMUM])
_Q3_K = np.dtype([("high", "u1", 32), ("codes", "u1", 64), ("groups", "u1", 12), _HALF_SCALE])
_Q4_K = np.dtype([_HALF_SCALE, _HALF_MINIMUM, ("groups", "u1", 12), ("codes", "u1", 128)])
_Q5_K = np.dtype(
    [_HALF_SCALE, _HALF_MINIMUM, ("groups", "u1", 12), ("high", "u1", 32), ("codes", "u1", 128)]
)
_Q6_K = np.dtype([("codes", "u1", 128), ("high", "u1", 64), ("groups", "i1", 16), _HALF_SCALE])
_Q8_K = np.dtype([("scale", "<f4"), ("codes", "i1", 256), ("sums", "<i2", 16)])


def _scaled(
    scale: NDArray[Any],  # [blocks]
    groups: NDArray[Any],  # [blocks, groups]
) -> NDArray[np.float32]:
    """Per-group floats, [blocks, groups, 1]."""
    return (scale.astype(np.float32)[:, None] * groups.astype(np.float32))[:, :, None]


def _grouped(codes: NDArray[Any], group: int) -> NDArray[np.float32]:
    return codes.astype(np.float32).reshape(len(codes), -1, group)


def _flat(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values.reshape(len(values), -1)


def _decode_q2_k(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """A group's byte: scale in the low half, minimum in the high half."""
    scale = _scaled(blocks["scale"], blocks["groups"] & 15)
    minimum = _scaled(blocks["minimum"], blocks["groups"] >> 4)
    return _flat(scale * _grouped(unpack(blocks["codes"], 2, 32), 16) - minimum)


def _decode_q3_k(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """Group scales are 6 bits around 32: low halves in 8 bytes, then the top pairs in 4 bytes."""
    low, high = blocks["groups"][:, :8], blocks["groups"][:, 8:]
    groups = unpack(low, 4, 8) | unpack(high, 2, 4) << 4
    codes = unpack(blocks["codes"], 2, 32) | unpack(blocks["high"], 1, 32) << 2
    scale = _scaled(blocks["scale"], groups.astype(np.float32) - 32)
    return _flat(scale * (_grouped(codes, 16) - 4))


def _group_scales_minimums(groups: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The 6-bit scales and minimums of eight groups, from 12 bytes.

    Groups 0-3 sit in the low 6 bits of bytes 0-3 (scales) and 4-7 (minimums). Groups 4-7 have
    their low 4 bits in bytes 8-11 (scale low half, minimum high half) and their top 2 in the bits
    that groups 0-3 leave free.
    """
    first = groups[:, :8] & 63
    last = unpack(groups[:, 8:], 4, 4) | groups[:, :8] >> 6 << 4
    scales = np.concatenate([first[:, :4], last[:, :4]], axis=1)
    minimums = np.concatenate([first[:, 4:], last[:, 4:]], axis=1)
    return scales, minimums


def _decode_q4_k_q5_k(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """Codes of 4 bits, of 5 where the layout has `high`."""
    codes = unpack(blocks["codes"], 4, 32)
    if "high" in (blocks.dtype.names or ()):
        codes |= unpack(blocks["high"], 1, 32) << 4
    scales, minimums = _group_scales_minimums(blocks["groups"])
    scale, minimum = _scaled(blocks["scale"], scales), _scaled(blocks["minimum"], minimums)
    return _flat(scale * _grouped(codes, 32) - minimum)


def _decode_q6_k(blocks: NDArray[Any]) -> NDArray[np.float32]:
    codes = unpack(blocks["codes"], 4, 64) | unpack(blocks["high"], 2, 32) << 4
    scale = _scaled(blocks["scale"], blocks["groups"])
    return _flat(scale * (_grouped(codes, 16) - 32))


def _decode_q8_k(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """`sums` (of each 16 codes) only speed up dot products."""
    return blocks["scale"].astype(np.float32)[:, None] * blocks["codes"].astype(np.float32)


FORMATS = (
    Format("q2_k", 10, 256, _Q2_K, _decode_q2_k),
    Format("q3_k", 11, 256, _Q3_K, _decode_q3_k),
    Format("q4_k", 12, 256, _Q4_K, _decode_q4_k_q5_k),
    Format("q5_k", 13, 256, _Q5_K, _decode_q4_k_q5_k),
    Format("q6_k", 14, 256, _Q6_K, _decode_q6_k),
    Format("q8_k", 15, 256, _Q8_K, _decode_q8_k),
)
