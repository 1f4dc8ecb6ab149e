"""Plain floats as blocks of one value: f32, f16 (IEEE half) and bf16 (the upper half of an f32)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.quant.format import Format


def _decode_float(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return blocks.astype(np.float32)[:, None]


def _decode_bf16(blocks: NDArray[Any]) -> NDArray[np.float32]:
    return (blocks.astype(np.uint32) << 16).view(np.float32)[:, None]


def _encode_f32(values: NDArray[np.float32]) -> NDArray[Any]:
    return values.astype("<f4")


def _encode_f16(values: NDArray[np.float32]) -> NDArray[Any]:
    return values.astype("<f2")


def _encode_bf16(values: NDArray[np.float32]) -> NDArray[Any]:
    """Rounds half to even; a NaN stays a NaN even when its payload sits in the dropped half."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype("<u2")


FORMATS = (
    Format("f32", 0, 1, np.dtype("<f4"), _decode_float, _encode_f32),
    Format("f16", 1, 1, np.dtype("<f2"), _decode_float, _encode_f16),
    Format("bf16", 30, 1, np.dtype("<u2"), _decode_bf16, _encode_bf16),
)
