"""Triton's products, interpreted: against NumPy in float64, and exactness by bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpu.asking import Products
from gpu.test_products import ROWS, assert_close, floats, weight_of
from reference_executor import ACTIVATIONS
from squall.gpu import linear, triton_linear
from squall.gpu.matrices import Packed, Plain
from squall.quant import FORMATS

products = Products(triton_linear)
both = pytest.mark.parametrize("exact", [True, False])


def gate_of(x: NDArray[np.float64], activation: str | None) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return np.asarray(ACTIVATIONS[activation](x), np.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str, rng: np.random.Generator) -> None:
    block = FORMATS[name].block
    rows, cols = (19, 77) if block == 1 else (19, block * max(1, 160 // block))
    w, values = weight_of(name, rng, rows, cols)
    for n, exact in ((3, True), (1, False)):
        x = floats(rng, n, cols)
        found = products.linear(x, w, exact=exact)
        assert_close(found, x.double().numpy() @ values[0].T)
    ids = torch.tensor([5, 0, 18, 5], dtype=torch.int32)
    rows = products.embed(ids, w, scale=0.5, dtype=torch.float32)
    assert_close(rows, 0.5 * values[0][ids.numpy()], 1e-6)


@both
@pytest.mark.parametrize("name", ["f16", "q4_k"])
def test_every_number_of_rows(name: str, exact: bool, rng: np.random.Generator) -> None:
    w, values = weight_of(name, rng, 21, 256)
    for n in (*ROWS, 65):
        dtype, tolerance = (torch.float16, 2e-3) if n % 2 else (torch.float32, 1e-5)
        x = floats(rng, n, 256).to(dtype)
        found = products.linear(x, w, exact=exact)
        assert found.dtype == dtype
        assert_close(found, x.double().numpy() @ values[0].T, tolerance)


@both
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 3), (65, 33), (3, 1031)])
def test_odd_widths(rows: int, cols: int, exact: bool, rng: np.random.Generator) -> None:
    w, values = weight_of("f32", rng, rows, cols)
    for n in (1, 9):
        x = floats(rng, n, cols + 2)[:, 1:-1]  # part of a wider tensor
        assert_close(products.linear(x, w, exact=exact), x.double().numpy() @ values[0].T)


@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 4])
def test_what_follows_a_product(
    n: int, activation: Any, exact: bool, rng: np.random.Generator
) -> None:
    w, values = weight_of("q8_0", rng, 10, 544)  # in two parts, if few rows
    x, bias, residual = floats(rng, n, 544), 3 * floats(rng, 10), floats(rng, n, 10)
    found = products.linear(
        x, w, bias=bias, activation=activation, scale=0.25, residual=residual, exact=exact
    )
    y = x.double().numpy() @ values[0].T + bias.numpy()
    assert_close(found, residual.numpy() + 0.25 * gate_of(y, activation))
    half = products.linear(x, w, bias=bias, exact=exact, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert_close(half, y, 1e-3)


@both
@pytest.mark.parametrize("n", [1, 65])
@pytest.mark.parametrize(
    ("gate", "up"), [("q4_0", "q6_k"), ("f16", "q4_k"), ("f8_e4m3", "f8_e4m3")]
)
def test_gated(n: int, gate: str, up: str, exact: bool, rng: np.random.Generator) -> None:
    (w, values), (v, others) = (weight_of(name, rng, 11, 256) for name in (gate, up))
    scale = 1 / np.abs(floats(rng, 1, 256).double().numpy() @ values[0].T).max()
    x, gate_bias, up_bias = floats(rng, n, 256) * float(scale), floats(rng, 11), floats(rng, 11)
    found = products.gated(
        x, w, v, gate_bias=gate_bias, up_bias=up_bias, activation="silu", exact=exact
    )
    first = x.double().numpy() @ values[0].T + gate_bias.numpy()
    second = x.double().numpy() @ others[0].T + up_bias.numpy()
    assert_close(found, gate_of(first, "silu") * second)


@both
@pytest.mark.parametrize("gate", [None, "q4_0"])
@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_experts(n: int, gate: str | None, exact: bool, rng: np.random.Generator) -> None:
    count, k = 5, 2
    up, ups = weight_of("q4_0", rng, 32, 96, count)
    down, downs = weight_of("q8_0", rng, 11, 32, count)
    weight, gates = weight_of(gate, rng, 32, 96, count) if gate else (None, ups)
    x, shares = floats(rng, n, 96), torch.from_numpy(rng.random((n, k), np.float32))
    chosen = np.array([rng.permutation(count - 1)[:k] for _ in range(n)], np.int32).reshape(n, k)
    biases = [floats(rng, count, width) for width in (32, 32, 11)]
    found = products.experts(
        x, torch.from_numpy(chosen), shares, gate=weight, up=up, down=down, gate_bias=biases[0],
        up_bias=biases[1], down_bias=biases[2], activation="relu", exact=exact,
    )  # fmt: skip
    expected = np.zeros((n, 11))
    for row, own in enumerate(chosen):
        for share, e in zip(shares[row].numpy(), own, strict=True):
            inner = x[row].double().numpy() @ ups[e].T + biases[1][e].numpy()
            first = x[row].double().numpy() @ gates[e].T + biases[0][e].numpy()
            inner = gate_of(first, "relu") * inner if gate else gate_of(inner, "relu")
            expected[row] += share * (inner @ downs[e].T + biases[2][e].numpy())
    assert found.dtype == torch.float32
    if n:
        assert_close(found, expected)


@pytest.mark.parametrize(("name", "dtype"), [("q4_k", torch.float32), ("f16", torch.float16)])
def test_bytes_depend_on_nothing_else(
    name: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """A row's: neither on how many rows there are, nor on where it stands."""
    w, _ = weight_of(name, rng, 66, 768)  # in two parts
    x = floats(rng, 65, 768).to(dtype)
    together = products.linear(x, w, exact=True)
    for at in (slice(64, 65), slice(3, 5), slice(1, 18)):
        assert torch.equal(products.linear(x[at], w, exact=True), together[at])
    both = products.gated(x, w, w, activation="silu", exact=True)
    assert torch.equal(products.gated(x[9:10], w, w, activation="silu", exact=True), both[9:10])


def test_bytes_of_experts(rng: np.random.Generator) -> None:
    up, _ = weight_of("q4_0", rng, 32, 96, 4)
    down, _ = weight_of("q4_0", rng, 20, 32, 4)
    x, shares = floats(rng, 70, 96), torch.from_numpy(rng.random((70, 2), np.float32))
    chosen = torch.from_numpy(rng.integers(0, 4, (70, 2), np.int32))

    def found(at: slice) -> torch.Tensor:
        return products.experts(
            x[at], chosen[at], shares[at], gate=up, up=up, down=down, activation="silu", exact=True
        )

    together = found(slice(0, 70))
    for at in (slice(3, 4), slice(60, 63), slice(10, 40)):
        assert torch.equal(found(at), together[at])


def test_many_rows_go_to_the_library(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are to be exact."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    w, values = weight_of("q4_k", rng, 6, 256, experts=2)
    assert_close(products.dense(w, 1, torch.float32), values[1], 1e-6)
    w, values = weight_of("q4_k", rng, 6, 256)
    x, bias = floats(rng, 512, 256), floats(rng, 6)
    expected = x.double().numpy() @ values[0].T + bias.numpy()
    assert_close(Products(linear).linear(x, w, bias=bias, exact=False), expected)
    monkeypatch.setattr(products, "_product", None)
    assert_close(Products(linear).linear(x, w, bias=bias, exact=False), expected)


def test_parts_are_of_the_weight_alone() -> None:
    assert products._parts(4096, 4096) == (4, 1024)
    assert products._parts(128256, 4096) == (1, 4096)
    for rows, cols in ((1, 1), (64, 14336), (4096, 11008), (1024, 513)):
        parts, span = products._parts(rows, cols)
        assert (parts - 1) * span < cols <= parts * span
        assert span % 256 == 0


def test_types_are_those_of_the_layout(rng: np.random.Generator) -> None:
    assert isinstance(weight_of("q4_k", rng, 1, 256)[0], Packed)
    assert isinstance(weight_of("f16", rng, 1, 3)[0], Plain)
