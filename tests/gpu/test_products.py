"""Products with weights on a device against NumPy's, and exactness by bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpu.asking import Products
from gpu.test_matrices import CPU, loaded, matrix, stored
from quant.random_blocks import random_blocks
from reference_executor import ACTIVATIONS
from squall.gpu import linear, uses_triton
from squall.gpu.matrices import plain
from squall.quant import FORMATS
from squall.weights import Stored

ROWS = (1, 2, 3, 8, 16, 17, 64)
products = Products(linear)
SHAPES = [(1, 1), (5, 3), (33, 65), (100, 256), (7, 1000), (16, 4099)]

activations = pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
both = pytest.mark.parametrize("exact", [True, False])


@pytest.fixture(autouse=True)
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(params=[1, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weight_of(
    name: str, rng: np.random.Generator, rows: int, cols: int, experts: int = 1
) -> tuple[Any, NDArray[np.float64]]:
    """A weight on the device, and its values [experts, rows, cols]."""
    format = FORMATS[name]
    data = random_blocks(format, rng, experts * rows * cols // format.block)
    found = loaded(stored(format, data, cols), matrix(rows, cols, experts))
    return found, format.dequantize(data).reshape(experts, rows, cols).astype(np.float64)


def floats(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


def assert_close(
    found: torch.Tensor,
    expected: NDArray[np.float64],
    tolerance: float = 1e-5,
    size: NDArray[np.float64] | float = 0.0,
) -> None:
    """Relative to the largest, or to sizes of what was added up."""
    assert found.shape == expected.shape
    off = np.abs(found.double().numpy() - expected)
    assert (off <= tolerance * (size + np.abs(expected).max())).all()


def test_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not uses_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert uses_triton(torch.zeros(1))


@both
@pytest.mark.parametrize("name", FORMATS)
def test_linear(name: str, exact: bool, rng: np.random.Generator) -> None:
    block = FORMATS[name].block
    for rows, cols in SHAPES if block == 1 else [(1, block), (33, 3 * block), (100, 5 * block)]:
        w, values = weight_of(name, rng, rows, cols)
        for n in ROWS:
            x = floats(rng, n, cols) * 0.01
            found = products.linear(x, w, exact=exact)
            assert found.dtype == torch.float32
            given = x.double().numpy()
            size = np.abs(given) @ np.abs(values[0].T)
            assert_close(found, given @ values[0].T, 1e-6, size)


@both
@activations
def test_what_follows_a_product(activation: Any, exact: bool, rng: np.random.Generator) -> None:
    w, values = weight_of("q8_0", rng, 33, 96)
    x, bias, residual = floats(rng, 17, 96), floats(rng, 33), floats(rng, 17, 33)
    found = products.linear(
        x, w, bias=bias, activation=activation, scale=0.3, residual=residual, exact=exact
    )
    y = x.double().numpy() @ values[0].T + bias.numpy()
    assert_close(found, residual.numpy() + 0.3 * ACTIVATIONS[activation](y), 3e-5)


@both
@activations
def test_gated(activation: Any, exact: bool, rng: np.random.Generator) -> None:
    gate, of_gate = weight_of("q4_0", rng, 33, 96)
    up, of_up = weight_of("f32", rng, 33, 96)
    x, biases = floats(rng, 17, 96), (floats(rng, 33), floats(rng, 33))
    given = x.double().numpy()
    for one, other in [(None, None), biases]:
        found = products.gated(
            x, gate, up, gate_bias=one, up_bias=other, activation=activation, exact=exact
        )
        first, second = given @ of_gate[0].T, given @ of_up[0].T
        if one is not None and other is not None:
            first, second = first + one.numpy(), second + other.numpy()
        assert_close(found, ACTIVATIONS[activation](first) * second, 3e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["bf16", "q4_k", "f8_e4m3"])
def test_short_floats(name: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    w, values = weight_of(name, rng, 33, 512)
    x, bias = floats(rng, 17, 512).to(dtype), floats(rng, 33)
    y = x.double().numpy() @ values[0].T + bias.numpy()
    found = products.linear(x, w, bias=bias, exact=False)
    assert found.dtype == dtype
    assert_close(found.float(), y, 2e-2)
    residual = floats(rng, 17, 33).to(dtype)
    sums = products.linear(x, w, residual=residual, exact=False)
    assert sums.dtype == dtype
    assert_close(sums.float(), y - bias.numpy() + residual.double().numpy(), 2e-2)
    wide = products.linear(x, w, bias=bias, exact=False, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert_close(wide, y, 2e-2)


@pytest.mark.parametrize("name", ["f32", "f16", "q4_k", "f8_e4m3"])
def test_embed(name: str, rng: np.random.Generator) -> None:
    table, values = weight_of(name, rng, 100, 256)
    ids = rng.integers(0, 100, 17).astype(np.int32)
    for dtype in (torch.float32, torch.float16):
        found = products.embed(torch.from_numpy(ids), table, scale=1.5, dtype=dtype)
        expected = torch.from_numpy(values[0, ids].astype(np.float32) * np.float32(1.5)).to(dtype)
        assert torch.equal(found, expected)


@both
@pytest.mark.parametrize("name", ["f32", "q4_k", "int4_g128"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_experts(name: str, has_gate: bool, exact: bool, rng: np.random.Generator) -> None:
    experts, k, cols, inner = 5, 3, 256, 512
    weights = [weight_of(name, rng, inner, cols, experts) for _ in range(2)]
    weights.append(weight_of(name, rng, cols, inner, experts))
    (gate, of_gate), (up, of_up), (down, of_down) = weights
    biases = [floats(rng, experts * rows) for rows in (inner, inner, cols)]
    for n in (1, 2, 17, 40):
        x = floats(rng, n, cols) * 0.01
        chosen = np.argsort(rng.random((n, experts)))[:, :k].astype(np.int32)
        shares = floats(rng, n, k)
        found = products.experts(
            x, torch.from_numpy(chosen), shares, gate=gate if has_gate else None, up=up, down=down,
            gate_bias=biases[0] if has_gate else None, up_bias=biases[1], down_bias=biases[2],
            activation="silu", exact=exact,
        )  # fmt: skip
        gates, ups, downs = (bias.numpy().reshape(experts, -1) for bias in biases)
        expected = np.zeros((n, cols))
        for row, e, share in of_rows(chosen, shares):
            given = x[row].double().numpy()
            y = of_up[e] @ given + ups[e]
            if has_gate:
                y *= ACTIVATIONS["silu"](of_gate[e] @ given + gates[e])
            else:
                y = ACTIVATIONS["silu"](y)
            expected[row] += share * (of_down[e] @ y + downs[e])
        assert_close(found, expected, 3e-5)


def of_rows(chosen: NDArray[np.int32], shares: torch.Tensor) -> Iterator[tuple[int, int, float]]:
    for row, experts in enumerate(chosen):
        for i, expert in enumerate(experts):
            yield row, int(expert), float(shares[row, i])


def test_float8_times_float8(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on chips that multiply them; each row of activations has a scale of its own."""
    monkeypatch.setattr(linear, "_fits", lambda *_: True)
    w, values = weight_of("f8_e4m3", rng, 48, 256)
    x = floats(rng, 32, 256) * torch.logspace(-6, 3, 32)[:, None]
    x[5] = 0
    scales = np.maximum(x.abs().amax(1, keepdim=True).numpy(), 1e-12) / np.float32(448)
    format = FORMATS["f8_e4m3"]
    given = format.dequantize(format.quantize((x.numpy() / scales).reshape(-1))).reshape(32, 256)
    found = products.linear(x, w, exact=False).double().numpy() / scales
    np.testing.assert_allclose(found, given.astype(np.float64) @ values[0].T, 2**-8, 0.1)


# ---- a row's bytes depend on nothing but the row ----


def exact_functions(rng: np.random.Generator) -> dict[str, Any]:
    """Rows of 300 columns -> rows, of shapes where a BLAS adds up in several ways."""
    found: dict[str, Any] = {}
    for rows, cols in [(100, 1000), (64, 4096), (576, 576), (7, 13), (1, 2048), (320, 2560)]:
        w = plain(Stored("f32", bytes_of(floats(rng, rows, cols)), None), rows, cols, CPU)
        found[f"{rows} x {cols}"] = cols, lambda x, w=w: products.linear(x, w, exact=True)
    for name, rows in [("q4_k", 100), ("f8_e4m3", 33)]:
        w, _ = weight_of(name, rng, rows, 1024)
        found[name] = 1024, lambda x, w=w: products.linear(x, w, exact=True)
    w, _ = weight_of("q8_0", rng, 100, 64)
    for activation in ACTIVATIONS:
        if activation is not None:
            found[activation] = (
                64,
                lambda x, w=w, a=activation: products.gated(x, w, w, activation=a, exact=True),
            )
    up, down = weight_of("f32", rng, 96, 64, 4)[0], weight_of("f32", rng, 64, 96, 4)[0]

    def mixed(x: torch.Tensor) -> torch.Tensor:
        scores, chosen = x[:, :4].abs().sort(dim=1, descending=True)
        given = chosen[:, :2].int(), scores[:, :2]
        return products.experts(
            x, *given, gate=up, up=up, down=down, activation="gelu_tanh", exact=True
        )

    found["experts"] = 64, mixed
    return found


def bytes_of(values: torch.Tensor) -> NDArray[np.uint8]:
    return values.numpy().reshape(-1).view(np.uint8)


def test_exact_rows_do_not_depend_on_others(threads: int, rng: np.random.Generator) -> None:
    for name, (cols, function) in exact_functions(rng).items():
        x = floats(rng, 150, cols)
        torch.set_num_threads(1)
        whole = function(x)
        torch.set_num_threads(threads)
        assert torch.equal(function(x), whole), name
        for start, stop in [(0, 1), (149, 150), (3, 5), (20, 37), (16, 48), (7, 100)]:
            part = function(x[start:stop].clone())
            assert torch.equal(part, whole[start:stop]), f"{name} {start}:{stop}"
