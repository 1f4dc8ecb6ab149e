"""Triton's norms and rotary embeddings, interpreted: against NumPy in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from gpu.test_products import assert_close, floats
from squall.gpu import triton_rows


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    ("width", "group", "size"),
    [(48, 16, 16), (48, 48, 48), (36, 12, 36), (5001, 5001, 5001), (1, 1, 1)],
)
@pytest.mark.parametrize("biased", [True, False])
def test_normalize(
    kind: Literal["rms", "layer"],
    width: int,
    group: int,
    size: int,
    biased: bool,
    rng: np.random.Generator,
) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        x = floats(rng, 3, width + 2)[:, 1:-1].to(dtype)
        weight, bias = floats(rng, size), floats(rng, size) if biased else None
        found = triton_rows.normalize(x, weight, bias, kind, 1e-5, group)
        y = x.double().numpy().reshape(3, -1, group)
        if kind == "layer":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5)
        y = y.reshape(3, width) * np.tile(weight.numpy(), width // size)
        if bias is not None:
            y = y + np.tile(bias.numpy(), width // size)
        assert found.dtype == dtype
        assert_close(found, y, tolerance)
        assert torch.equal(
            triton_rows.normalize(x[1:2], weight, bias, kind, 1e-5, group), found[1:2]
        )


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("heads", "size", "dims"), [(4, 16, 16), (3, 20, 12), (1, 8, 4), (40, 64, 64)]
)
def test_rotate(
    heads: int, size: int, dims: int, interleaved: bool, rng: np.random.Generator
) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        x, angles = floats(rng, 3, heads * size).to(dtype), floats(rng, 3, dims)
        found = triton_rows.rotate(x, angles, heads, size, interleaved)
        y = x.double().numpy().reshape(3, heads, size).copy()
        cos, sin = np.split(angles.numpy()[:, None, :].astype(np.float64), 2, axis=2)
        half = dims // 2
        a = slice(0, dims, 2) if interleaved else slice(0, half)
        b = slice(1, dims, 2) if interleaved else slice(half, dims)
        first, second = y[..., a].copy(), y[..., b].copy()
        y[..., a] = first * cos - second * sin
        y[..., b] = second * cos + first * sin
        assert found.dtype == dtype
        assert_close(found, y.reshape(3, -1), tolerance)
        assert torch.equal(
            triton_rows.rotate(x[1:2], angles[1:2], heads, size, interleaved), found[1:2]
        )


def test_no_rows(rng: np.random.Generator) -> None:
    empty = floats(rng, 0, 16)
    assert triton_rows.normalize(empty, floats(rng, 16), None, "rms", 1e-5, 16).shape == (0, 16)
    assert triton_rows.rotate(empty, floats(rng, 0, 8), 2, 8, False).shape == (0, 16)
