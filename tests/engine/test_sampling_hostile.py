"""Strange numbers and strange processors harm one row at most."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from squall.engine.sampling import (
    Dry,
    RowSampling,
    Sampled,
    SamplerState,
    Sampling,
    sample_rows,
)
from squall.errors import SamplingFailed

ANY = st.floats(width=32, allow_nan=False, allow_infinity=True)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.just(0.0) | POSITIVE,
        "top_k": st.integers(0, 200),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": POSITIVE,
        "logit_bias": st.dictionaries(
            st.integers(0, 150), st.floats(allow_nan=False, max_value=1.7e308), max_size=5
        ),
        "dry": st.builds(Dry, st.floats(0, 1e308), base=st.floats(1, 1e308)),
    },
)


@given(
    logits=hnp.arrays(np.float32, st.integers(1, 150), elements=ANY),
    options=OPTIONS,
    ids=st.lists(st.integers(-3, 160), max_size=20),
    banned=st.lists(st.integers(-3, 160), max_size=5),
    top=st.none() | st.integers(0, 20),
    allowed=st.none() | st.lists(st.integers(0, 2**32 - 1), min_size=5, max_size=5),
    spoiled=st.none() | st.integers(0, 150),
)
def test_a_possible_token_or_an_error(  # noqa: PLR0913
    logits: NDArray[np.float32],
    options: dict[str, Any],
    ids: list[int],
    banned: list[int],
    top: int | None,
    allowed: list[int] | None,
    spoiled: int | None,
) -> None:
    if spoiled is not None:
        logits[spoiled % len(logits)] = np.nan
    forbidden = {i for i, bias in options.get("logit_bias", {}).items() if bias == -math.inf}
    possible = {
        i for i, x in enumerate(logits) if x > -math.inf and i not in forbidden and i not in banned
    }
    mask = None
    if allowed is not None:
        mask = np.array(allowed[: -(-len(logits) // 32)], np.uint32)
        possible = {i for i in possible if allowed[i // 32] >> i % 32 & 1}
    before = logits.tobytes()
    state = SamplerState(Sampling(**(options | {"seed": 3})), ids, prompt_length=len(ids) // 2)
    row = RowSampling(state, banned, top, mask)
    plain = RowSampling(SamplerState(Sampling(0.0), []))
    found, beside = sample_rows(np.stack([logits, np.ones_like(logits)]), [row, plain])
    assert logits.tobytes() == before
    assert beside == Sampled(0, None, ())
    if spoiled is not None:
        assert isinstance(found, SamplingFailed)
        assert "logits are NaN" in str(found)
        return
    if not possible:
        assert isinstance(found, SamplingFailed)
        return
    assert isinstance(found, Sampled)
    assert found.token in possible
    if top is not None:
        assert found.logprob is not None
        assert found.logprob <= 1e-6
        finite = int((logits > -math.inf).sum())
        assert len(found.top) == min(top, finite)
        assert all(logprob <= 1e-6 for _, logprob in found.top)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_infinite_logits_share_what_there_is(temperature: float) -> None:
    logits = np.array([1.0, math.inf, 3e38, math.inf, -math.inf], np.float32)
    rows = [RowSampling(SamplerState(Sampling(temperature, seed=i), []), (), 2) for i in range(99)]
    found = [s for s in sample_rows(np.tile(logits, (99, 1)), rows) if isinstance(s, Sampled)]
    assert {s.token for s in found} == ({1} if temperature == 0 else {1, 3})
    assert found[0].top == ((1, pytest.approx(-math.log(2))), (3, pytest.approx(-math.log(2))))


def processed(*processors: Any, temperature: float = 0.0) -> Sampled | SamplingFailed:
    """One row with these processors, beside one without."""
    logits = np.array([[0, 1, 2, 3], [0, 1, 2, 3]], np.float32)
    sampling = Sampling(temperature, presence_penalty=2.0, logits_processors=processors)
    rows = [
        RowSampling(SamplerState(sampling, [0, 3], prompt_length=1), (2,), 0),
        RowSampling(SamplerState(Sampling(0.0), [])),
    ]
    found, beside = sample_rows(logits, rows)
    assert beside == Sampled(3, None, ())
    assert logits.tolist() == [[0, 1, 2, 3]] * 2
    return found


def test_processors_see_what_was_adjusted_and_the_ids() -> None:
    seen = []

    def look(logits: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        seen.append((logits.tolist(), logits.dtype, ids.tolist()))

    assert isinstance(processed(look), Sampled)
    assert seen == [([0, 1, -math.inf, 1], np.float32, [0, 3])]


def test_processors_change_in_place_or_return() -> None:
    def lift(logits: NDArray[np.float32], _: object) -> None:
        logits[0] = 50

    def swap(logits: NDArray[np.float32], _: object) -> NDArray[np.float64]:
        return logits[::-1].astype(np.float64)

    one = processed(lift)
    both = processed(lift, swap)
    assert isinstance(one, Sampled)
    assert isinstance(both, Sampled)
    assert (one.token, both.token) == (0, 3)
    # The log-probability is still the model's own.
    assert both.logprob == pytest.approx(3 - math.log(sum(math.exp(i) for i in range(4))))


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda *_: 1 / 0, "<lambda> failed: ZeroDivisionError: division by zero"),
        (lambda *_: np.zeros(3), r"<lambda> returned the shape \(3,\), not \(4,\)"),
        (lambda *_: np.zeros((1, 4)), r"returned the shape \(1, 4\)"),
        (lambda *_: "text", "failed: ValueError"),
        (lambda *_: object(), "failed: TypeError"),
        (lambda: None, "failed: TypeError"),
        (lambda x, _: x * np.float32("nan"), "no token can be chosen: every logit is NaN"),
        (lambda x, _: np.full_like(x, -np.inf), "no token can be chosen"),
    ],
)
def test_a_bad_processor_harms_its_own_row(processor: Any, message: str) -> None:
    found = processed(processor)
    assert isinstance(found, SamplingFailed)
    with pytest.raises(SamplingFailed, match=message):
        raise found
