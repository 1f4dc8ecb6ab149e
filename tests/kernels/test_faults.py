"""Hostile arguments, strange callers and lack of resources, as Python can bring them."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from squall import _native

VOCAB, WIDTH, BLOCK = 20, 32, 16
HUGE = 2**31


def executor(table: NDArray[np.float32]) -> _native.Executor:
    """Logits are the products of a token's embedding with all, after attention."""
    tile = _native.pack("f32", table.reshape(-1).view(np.uint8), VOCAB, WIDTH)
    e = _native.Executor("scalar", _native.ThreadPool(2), [64, 8], 8, BLOCK, 64, "f16")
    x, q, seen = (e.value(WIDTH, 0, False) for _ in range(3))
    wanted, logits = e.value(WIDTH, 1, False), e.value(VOCAB, 1, False)
    tokens, spans, outputs = e.index(0, 1), e.index(0, 2), e.index(1, 1)
    e.cache(1, WIDTH)
    e.embed(x, tokens, tile, 1.0)
    e.add(q, x, x, 1.0)
    e.attend(seen, q, x, x, spans, 0, 1, 1, WIDTH, 0.2, None, None)
    e.gather_rows(wanted, seen, outputs)
    e.linear(logits, wanted, tile, None, None, 1.0, None)
    e.plan([logits])
    return e


def step(
    e: _native.Executor,
    tokens: list[int],
    bounds: list[int],
    *,
    tables: NDArray[np.int32] | None = None,
    positions: list[int] | None = None,
) -> NDArray[np.float32]:
    """One step of two sequences of three tokens each."""
    at = np.array(positions or [0, 1, 2, 0, 1, 2], np.int32)
    tables = np.array([[0], [1]], np.int32) if tables is None else tables
    outputs, logits = np.array([2, 5], np.int32), np.empty((2, VOCAB), np.float32)
    indices = [np.array(tokens, np.int32), np.stack([0 * at, at + 1]), outputs]
    e.run([6, 2], indices, [], at, np.array(bounds, np.int32), tables, [logits])
    return logits


@pytest.mark.parametrize(
    "bounds",
    [[0, 2**31 - 1, 6], [0, -1, 6], [0, -(2**31), 6], [0, 7, 6], [1, 3, 6], [0, 3, 7], [0, 3, -1]],
)
def test_bounds_are_checked_before_they_are_used(
    bounds: list[int], rng: np.random.Generator
) -> None:
    e = executor(rng.standard_normal((VOCAB, WIDTH), np.float32))
    with pytest.raises(ValueError, match="bounds must"):
        step(e, [1, 2, 3, 4, 5, 6], bounds)


@pytest.mark.parametrize("block", [-1, 8, 2**31 - 1, -(2**31)])
def test_blocks_are_checked_before_they_are_used(block: int, rng: np.random.Generator) -> None:
    e = executor(rng.standard_normal((VOCAB, WIDTH), np.float32))
    tables = np.array([[0], [block]], np.int32)
    with pytest.raises(ValueError, match="a block is outside the KV cache"):
        step(e, [1, 2, 3, 4, 5, 6], [0, 3, 6], tables=tables)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_reaches_the_logits_of_its_sequence_alone(bad: float, rng: np.random.Generator) -> None:
    table = rng.standard_normal((VOCAB, WIDTH), np.float32)
    table[7, 3] = bad
    e = executor(table)
    clean = step(e, [1, 2, 3, 4, 5, 6], [0, 3, 6])
    columns = [token for token in range(VOCAB) if token != 7]
    assert np.isfinite(clean[:, columns]).all()
    spoiled = step(e, [1, 7, 3, 4, 5, 6], [0, 3, 6])
    assert np.isnan(spoiled[0]).all()
    assert spoiled[1].tobytes() == clean[1].tobytes()


@contextmanager
def rounding_up() -> Iterator[None]:
    name = ctypes.util.find_library("m")
    upward = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())
    if name is None or upward is None:
        pytest.skip("fesetround is not known here")
    library = ctypes.CDLL(name)
    assert library.fesetround(upward) == 0
    try:
        yield
        assert library.fegetround() == upward
    finally:
        library.fesetround(0)


def _options(**values: Any) -> _native.SamplingOptions:
    options = _native.SamplingOptions()
    for name, value in values.items():
        setattr(options, name, value)
    return options


def _work(name: str, x: NDArray[np.float32]) -> bytes:
    if name == "linear":
        tile = _native.pack("f32", x.reshape(-1).view(np.uint8), *x.shape)
        return _native.linear(x, tile, _native.isas()[0], 2).tobytes()
    if name == "adjusted":
        state = _native.SamplerState(_options(repetition=1.3), 0)
        state.extend(list(range(64)), b"")
        return state.adjusted(x[0], []).tobytes()
    if name == "sample":
        state = _native.SamplerState(_options(temperature=0.7, top_p=0.9, seed=2), 0)
        return repr(_native.sample(x, [(0, state, None, [], None, 5)], None)).encode()
    blocks, _ = _native.quantize(name, x)
    return blocks.tobytes() + _native.pack(name, blocks, *x.shape).dequantize().tobytes()


@pytest.mark.parametrize("name", ["linear", "adjusted", "sample", "q4_k", "q8_0", "hqq4"])
def test_the_callers_rounding_changes_nothing(name: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((16, 256), np.float32)
    plain = _work(name, x)
    with rounding_up():
        found = _work(name, x)
    assert found == plain


NOTHING = np.zeros(0, np.uint8)


@pytest.mark.parametrize(
    "act",
    [
        lambda: _native.pack("f32", NOTHING, HUGE, HUGE),
        lambda: _native.pack("q8_0", NOTHING, HUGE, HUGE),
        lambda: _native.quantize_tile("f32", NOTHING, 2**62, 4, "f16"),
        lambda: _native.quantize_tile("f16", NOTHING, HUGE, 2**32, "q8_0"),
        lambda: _native.quantize("q8_0", np.zeros((2**31, 0), np.float32)),
        lambda: _native.Executor("scalar", _native.ThreadPool(1), [HUGE, 1], 1, 16, 1, "f16"),
        lambda: _native.Executor("scalar", _native.ThreadPool(1), [1, 1], 1, 16, 2**63, "f16"),
        lambda: _native.Executor("scalar", _native.ThreadPool(1), [1, 1], 2**60, 16, 1, "f16"),
    ],
)
def test_sizes_beyond_memory_are_refused(act: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"too large|too many|below|whole|multiple"):
        act()


def test_a_program_beyond_memory_is_refused() -> None:
    e = _native.Executor("scalar", _native.ThreadPool(1), [2**30, 2**30], 1, 16, 1, "f16")
    with pytest.raises(ValueError, match="too large"):
        e.cache(2**55, 64)
    x, logits = e.value(2**27, 0, False, 2**20), e.value(2**27, 1, False, 2**20)
    e.gather_rows(logits, x, e.index(1, 1))
    with pytest.raises(ValueError, match="too large"):
        e.plan([logits])


def test_threads_that_cannot_be_had() -> None:
    """Their stacks do not fit the address space. A pool works when there is some again."""
    code = """
import resource, numpy as np
from squall import _native
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), -1))
try:
    _native.ThreadPool(500)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
tile = _native.pack("f32", np.ones(64, np.uint8), 1, 16, _native.ThreadPool(2))
print(tile.rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert first.startswith("only ")
    assert "of 500 threads could be had" in first
    assert second == "1"
    with pytest.raises(ValueError, match="at most 4096"):
        _native.ThreadPool(2**40)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, bad) for name in ("temperature", "top_p", "min_p", "repetition", "dry_base",
                                   "dry_multiplier") for bad in (NAN, INF, -INF, -1.0)),
        *((name, bad) for name in ("frequency", "presence") for bad in (NAN, INF, -INF)),
        ("top_p", 0.0), ("top_p", 1.5), ("min_p", 1.5), ("repetition", 0.0), ("dry_base", 0.9),
        ("dry_range", 0), ("dry_allowed_length", 0), ("bias", [(1, NAN)]), ("bias", [(1, INF)]),
    ],
)  # fmt: skip
def test_sampling_options_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        _native.SamplerState(_options(**{name: value}), 0)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1.0, 1e308])
def test_any_allowed_option_gives_a_token(temperature: float, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((1, 300), np.float32)
    for values in (
        {"top_k": 2**64 - 1, "top_p": 5e-324, "min_p": 5e-324},
        {"top_k": 1, "min_p": 1.0, "dry_range": 2**64 - 1, "dry_allowed_length": 2**64 - 1},
        {"frequency": 3e38, "presence": -3e38, "repetition": 5e-324},
        {"dry_multiplier": 1e308, "dry_base": 1e308, "repetition": 1e308},
    ):
        state = _native.SamplerState(_options(temperature=temperature, **values), 0)
        state.extend([1, 2, 3] * 50, b"")
        ((token, _, _),) = _native.sample(logits, [(0, state, None, [], None, 2**31 - 1)], None)
        assert 0 <= token < 300
