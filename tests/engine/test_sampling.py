"""Parameters are checked; draws follow the distribution that the documented order gives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sampling_reference import adjust, capture, probabilities

from squall import _native
from squall.engine.sampling import (
    Breakers,
    Dry,
    RowSampling,
    Sampled,
    SamplerState,
    Sampling,
    sample_rows,
)
from squall.errors import InvalidRequest, SamplingFailed

GOOD = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
P = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def one(logits: NDArray[np.float32], row: RowSampling) -> Sampled:
    (sampled,) = sample_rows(logits[None], [row])
    assert isinstance(sampled, Sampled)
    return sampled


def draws(logits: NDArray[np.float32], options: dict[str, float], count: int) -> list[int]:
    """Tokens of `count` positions in a row."""
    state = SamplerState(Sampling(**(GOOD | options)), [])
    tokens = []
    for _ in range(count):
        tokens.append(one(logits, RowSampling(state)).token)
        state.append(0)
    return tokens


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
        {"frequency_penalty": 2.1},
        {"presence_penalty": math.nan},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
        {"min_tokens": -1},
        {"seed": 1.5},
        {"top_k": 2.5},
        {"top_k": True},
        {"temperature": True},
    ],
)
def test_out_of_range(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(InvalidRequest, match=rf"{name} is {value}"):
        Sampling(**(GOOD | wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({5: math.nan}, "logit_bias of token 5 is nan"),
        ({5: math.inf}, "logit_bias of token 5 is inf"),
        ({-1: 1.0}, "token id in logit_bias is -1"),
        ({"a": 1.0}, "token id in logit_bias is 'a'"),
        ({1.5: 1.0}, "token id in logit_bias is 1.5"),
        ({True: 1.0}, "token id in logit_bias is True"),
        ({5: "a"}, "logit_bias of token 5 is 'a'"),
        ({5: True}, "logit_bias of token 5 is True"),
        ({5: 10**400}, "logit_bias of token 5 is 1000"),
        ([5], r"logit_bias is \[5\]; it must be a mapping"),
        (dict.fromkeys(range(301), 0.0), "301 ids; it must be at most 300"),
    ],
)
def test_bad_biases(wrong: dict[int, float], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Sampling(logit_bias=wrong)


@pytest.mark.parametrize("wrong", [5, "ab", [5], (print, None)])
def test_bad_processors(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"logits_processors is .* functions"):
        Sampling(logits_processors=wrong)


def test_numbers_of_numpy_are_numbers() -> None:
    sampling = Sampling(np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**63))  # type: ignore[arg-type]
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 3, 2**63)


def test_a_bias_of_an_unknown_token() -> None:
    sampling = Sampling(logit_bias={4: 1.0})
    sampling.check_ids(5)
    with pytest.raises(InvalidRequest, match="is 4; it must be below 4"):
        sampling.check_ids(4)


@pytest.mark.parametrize(
    "wrong",
    [{"multiplier": -1}, {"base": 0.5}, {"allowed_length": 0}, {"range": 0}, {"base": math.nan}],
)
def test_bad_dry(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(InvalidRequest, match=f"dry_{name} is {value}"):
        Dry(**({"multiplier": 1.0} | wrong))


@pytest.mark.parametrize("texts", [("",), ("x" * 65,), ("x",) * 65])
def test_bad_breakers(texts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="dry_sequence_breakers"):
        Breakers(texts, lambda _: b"")


@pytest.mark.parametrize("top", [-1, 21])
def test_bad_top_logprobs(top: int) -> None:
    with pytest.raises(InvalidRequest, match=f"top_logprobs is {top}"):
        RowSampling(SamplerState(Sampling(), []), (), top)


def deviation(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """How many standard deviations chi-square is off (Wilson and Hilferty's approximation)."""
    assert not counts[expected == 0].any(), "a token that the limits exclude"
    possible = expected > 0
    degrees = int(possible.sum()) - 1
    chi2 = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
    if degrees == 0:
        return 0.0 if chi2 == 0 else math.inf
    spread = 2 / (9 * degrees)
    return float(((chi2 / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.7},
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 299},
        {"top_p": 0.6},
        {"top_p": 0.97},
        {"min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.03},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "frequency_penalty": 0.3},
        {"top_p": 0.9, "presence_penalty": -1.0, "repetition_penalty": 1.2},
        {"logit_bias": {3: 2.0, 299: 1.0, 0: -3.0}, "top_k": 50},
    ],
)
def test_draws_follow_the_reference(options: dict[str, object]) -> None:
    """8,000 seeds at one place; the reference is plain NumPy."""
    rng = np.random.default_rng(len(str(options)))
    logits = (rng.standard_normal(300) * 2).astype(np.float32)
    ids = rng.integers(0, 300, 40).tolist()
    all_ = GOOD | options
    adjusted = adjust(logits.astype(np.float64), Sampling(**all_), ids, 20, (7,))
    count = 8000
    rows = [
        RowSampling(SamplerState(Sampling(**(all_ | {"seed": seed})), ids, prompt_length=20), (7,))
        for seed in range(count)
    ]
    sampled = sample_rows(np.tile(logits, (count, 1)), rows)
    counts = np.bincount([s.token for s in sampled if isinstance(s, Sampled)], minlength=300)
    assert counts.sum() == count
    assert deviation(counts, probabilities(adjusted, Sampling(**all_)) * count) < 4


def test_positions_follow_the_probabilities() -> None:
    counts = np.bincount(draws(P, {}, 20000), minlength=4)
    assert deviation(counts, np.exp(P.astype(np.float64)) * 20000) < 4


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_the_generator_is_uniform(seed: int) -> None:
    counts = np.bincount(draws(np.zeros(1000, np.float32), {"seed": seed}, 50000), minlength=1000)
    assert abs(deviation(counts, np.full(1000, 50.0))) < 4
    pairs = np.array(draws(np.zeros(20, np.float32), {"seed": seed}, 40000)).reshape(-1, 2)
    assert abs(deviation(np.bincount(pairs @ [20, 1], minlength=400), np.full(400, 50.0))) < 4


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [
        ({"temperature": 0.0}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": None}, {0, 1, 2, 3}),
        ({"top_p": 0.75}, {0, 1}),
        ({"top_p": 1e-300}, {0}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"temperature": 1e-300}, {0}),
        ({"top_k": 10**30}, {0, 1, 2, 3}),
        # Of what top_k leaves, 0.625 and 0.375, top_p counts.
        ({"top_k": 2, "top_p": 0.6}, {0}),
    ],
)
def test_limits(limit: dict[str, float], allowed: set[int]) -> None:
    assert set(draws(P, limit, 2000)) == allowed


def test_min_p_keeps_what_equals_the_largest() -> None:
    assert set(draws(np.array([3, 1, 3], np.float32), {"min_p": 1.0}, 200)) == {0, 2}


def test_a_huge_temperature_is_uniform() -> None:
    counts = np.bincount(draws(P, {"temperature": 1e300}, 20000), minlength=4)
    assert deviation(counts, np.full(4, 5000.0)) < 4


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}])
@pytest.mark.parametrize("place", [0, 17, 64, 199])
def test_the_lowest_of_equals(options: dict[str, float], place: int) -> None:
    logits = np.zeros(200, np.float32)
    logits[place:] = 1.0
    assert set(draws(logits, options, 5)) == {place}
    turned = -logits[::-1].copy()  # minus ones, then minus zeros
    assert set(draws(turned, options, 5)) == {(200 - place) % 200}


def test_the_seed_and_the_position_decide() -> None:
    logits = np.zeros(1000, np.float32)
    first = draws(logits, {"seed": 1}, 50)
    assert first == draws(logits, {"seed": 1}, 50)
    assert first != draws(logits, {"seed": 2}, 50)
    assert len(set(first)) > 40


def test_bans_and_biases_that_forbid() -> None:
    state = SamplerState(Sampling(**(GOOD | {"logit_bias": {1: -math.inf}})), [])
    tokens = {one(P, RowSampling(state, (0, 99, -1))).token for _ in range(1)}
    assert tokens <= {2, 3}
    (failed,) = sample_rows(P[None], [RowSampling(state, (0, 2, 3))])
    assert isinstance(failed, SamplingFailed)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.2},
        {"repetition_penalty": 1.3, "logit_bias": {3: 9.0, 70: -math.inf}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("vocab", [31, 64, 65, 1000])
def test_a_mask_is_a_ban_of_all_others(options: dict[str, Any], vocab: int) -> None:
    """Whole blocks that are out or in, and some in part."""
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((64, vocab)).astype(np.float32)
    for density in (0.02, 0.5, 1.0):
        inside = rng.random(vocab) < density
        inside[64:128], inside[128:192], inside[vocab // 2] = False, True, True
        bits = np.pad(inside, (0, -vocab % 32))
        mask = np.packbits(bits, bitorder="little").view(np.uint32)
        out = np.flatnonzero(~inside).tolist()
        states = [SamplerState(Sampling(seed=i, **options), [3, 9]) for i in range(len(logits))]
        masked = sample_rows(logits, [RowSampling(s, (), 3, mask) for s in states])
        assert masked == sample_rows(logits, [RowSampling(s, out, 3) for s in states])


def test_a_mask_holds_whatever_processors_say() -> None:
    wild = Sampling(0.0, logits_processors=(lambda x, _: np.arange(len(x), dtype=np.float32),))
    mask = np.array([0b1010], np.uint32)
    row = RowSampling(SamplerState(wild, []), allowed=mask)
    assert sample_rows(np.zeros((1, 9), np.float32), [row]) == [Sampled(3, None, ())]
    with pytest.raises(ValueError, match="mask"):
        sample_rows(np.zeros((1, 33), np.float32), [row])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 1, "min_p": 0.5}])
@pytest.mark.parametrize("vocab", [2, 63, 64, 1000, 49152])
def test_logprobs_are_the_models_own(options: dict[str, float], vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal(vocab) * 4 + 100).astype(np.float32)
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    sampling = Sampling(**(GOOD | options | {"logit_bias": {0: 50.0}, "frequency_penalty": 1.0}))
    for top in (0, 1, 20):
        found = one(logits, RowSampling(SamplerState(sampling, [1, 1], prompt_length=0), (), top))
        assert found.logprob == pytest.approx(exact[found.token], abs=1e-5)
        best = np.argsort(-exact, kind="stable")[:top]
        assert [token for token, _ in found.top] == best.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(exact[best], abs=1e-5)
    assert one(logits, RowSampling(SamplerState(sampling, []))).logprob is None


def test_penalties_are_the_formulas() -> None:
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal(50) * 5).astype(np.float32)
    ids = [*rng.integers(0, 50, 60).tolist(), 10**6, -5]  # ids outside change nothing
    options = {
        "logit_bias": {3: 4.5, 49: -100.0}, "frequency_penalty": 0.7, "presence_penalty": -1.1,
        "repetition_penalty": 1.3, "seed": 1,
    }  # fmt: skip
    expected = adjust(logits.astype(np.float64), Sampling(**options), ids[:-2], 25, (9,))
    assert capture(logits, options, ids, prompt=25, banned=(9,)) == pytest.approx(expected)


def fork(
    logits: NDArray[np.float32], rows: Sequence[RowSampling], threads: int
) -> list[Sampled | SamplingFailed]:
    return sample_rows(logits, rows, pool=_native.ThreadPool(threads))


def test_a_row_is_alone_in_any_company() -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((12, 5000)) * 3).astype(np.float32)
    kinds: list[dict[str, object]] = [
        {}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"temperature": 0.0},
        {"top_p": 0.95, "dry": Dry(1.0), "repetition_penalty": 1.1},
    ]  # fmt: skip
    rows = [
        RowSampling(
            SamplerState(Sampling(**(GOOD | kinds[i % 6] | {"seed": i})), [1, 2, 1, 2, i]),
            range(i),
            i if i % 3 else None,
        )
        for i in range(12)
    ]
    alone = [sample_rows(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert all(isinstance(sampled, Sampled) for sampled in alone)
    for threads in (1, 2, 3, 5):
        for order in (list(range(12)), rng.permutation(12).tolist(), [4, 4, 1]):
            together = fork(np.ascontiguousarray(logits[order]), [rows[i] for i in order], threads)
            assert together == [alone[i] for i in order]


PINNED = [
    ({"seed": 1}, 598, "-0x1.705870eef2c28p+2"),
    ({"temperature": 0.7, "top_p": 0.9, "seed": 2}, 2464, "-0x1.7f4760eef2c28p+2"),
    ({"top_k": 99, "seed": 3}, 407, "-0x1.75adc4eef2c28p+2"),
    ({"temperature": 2.0, "min_p": 0.01, "seed": 4}, 2891, "-0x1.0bcca57779614p+3"),
]


@pytest.mark.parametrize(("options", "token", "logprob"), PINNED)
def test_the_bits_are_the_same_everywhere(
    options: dict[str, float], token: int, logprob: str
) -> None:
    """Whatever the processor and its C library: logits by integer arithmetic, pinned results."""
    logits = ((np.arange(3000, dtype=np.int64) * 7919 % 3001) / 300).astype(np.float32)
    found = one(logits, RowSampling(SamplerState(Sampling(**(GOOD | options)), [7] * 9), (), 0))
    assert (found.token, (found.logprob or 0).hex()) == (token, logprob)


PAGE = (Path(__file__).parents[2] / "docs/sampling.md").read_text()


@pytest.mark.parametrize("text", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_the_examples_of_the_page_run(text: str) -> None:
    exec(text, {})


def test_the_page_knows_every_parameter() -> None:
    fields = {
        field.name for kind in (Sampling, Dry, Breakers) for field in dataclasses.fields(kind)
    }
    assert {name for name in fields if f"`{name}`" not in PAGE} == set()
