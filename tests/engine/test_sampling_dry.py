"""DRY against a quadratic reference, and breakers that break."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_reference import adjust, capture

from squall.engine.sampling import Breakers, Dry, SamplerState, Sampling

VOCAB = [b"a", b"b", b"ab", b"ba", b"\n", b"a\nb", b"<", b"br", b">", b"x<br", b"\xc3", b"\xa9"]
BREAKERS = ["\n", "<br>", "aa", "\u00e9", "bab"]
LOGITS = np.linspace(-3, 3, len(VOCAB)).astype(np.float32)


def penalties(ids: list[int], dry: Dry) -> dict[int, float]:
    """What DRY takes from each token that it takes something from."""
    taken = LOGITS - capture(LOGITS, {"dry": dry}, ids)
    return {int(i): float(taken[i]) for i in np.flatnonzero(taken)}


def breakers(*texts: str) -> Breakers:
    return Breakers(texts, VOCAB.__getitem__)


@given(
    ids=st.lists(st.integers(0, len(VOCAB) - 1), min_size=1, max_size=80),
    few=st.integers(1, len(VOCAB)),
    texts=st.sets(st.sampled_from(BREAKERS)),
    broken=st.frozensets(st.integers(0, len(VOCAB) - 1), max_size=1),
    allowed=st.integers(1, 5),
    range_=st.none() | st.integers(1, 90),
)
def test_the_reference_agrees(
    ids: list[int],
    few: int,
    texts: set[str],
    broken: frozenset[int],
    allowed: int,
    range_: int | None,
) -> None:
    ids = [id_ % few for id_ in ids]
    wanted = Breakers(tuple(sorted(texts)), VOCAB.__getitem__, broken)
    dry = Dry(0.25, base=1.5, allowed_length=allowed, breakers=wanted, range=range_)
    expected = adjust(LOGITS.astype(np.float64), Sampling(dry=dry), ids, len(ids), ())
    assert capture(LOGITS, {"dry": dry}, ids) == pytest.approx(expected)


@given(st.lists(st.integers(0, 3), max_size=40), st.data())
def test_tokens_one_by_one_are_the_same(ids: list[int], data: st.DataObject) -> None:
    """A state that is told its tokens in parts, against one that is told them at once."""
    dry = Dry(1.0, breakers=breakers("ab", "\n"))
    options = {"dry": dry, "frequency_penalty": 0.5, "seed": 0}
    cut = data.draw(st.integers(0, len(ids)))
    state = SamplerState(Sampling(**options), ids[:cut], prompt_length=min(cut, 5))
    for id_ in ids[cut:]:
        state.append(id_)
    assert state.native.length == len(ids)
    at_once = capture(LOGITS, options, ids, prompt=min(cut, 5))
    assert state.native.adjusted(LOGITS, []).tobytes() == at_once.tobytes()


def test_the_formula() -> None:
    assert penalties([0, 1, 2, 3, 0, 1, 2], Dry(0.8)) == pytest.approx({3: 0.8 * 1.75})
    assert penalties([0, 1, 3, 0, 1], Dry(0.8)) == pytest.approx({3: 0.8})
    assert penalties([1, 3, 0, 1], Dry(0.8)) == {}
    assert penalties([1, 3, 0, 1], Dry(0.8, allowed_length=1)) == pytest.approx({3: 0.8})
    assert penalties([], Dry(0.8)) == {}
    assert penalties([0, 1, 3, 0, 1], Dry(0.0)) == {}


def test_a_long_repeat_stays_finite_and_does_not_forbid() -> None:
    adjusted = capture(LOGITS, {"dry": Dry(1e300, base=1e300)}, [0] * 20000)
    assert np.isfinite(adjusted).all()
    assert adjusted[0] == np.finfo(np.float32).min


def test_the_range_limits_both_copies() -> None:
    ids = [0, 1, 3, 4, 4, 0, 1]
    assert penalties(ids, Dry(1.0, breakers=None, range=7)) == pytest.approx({3: 1.0})
    assert penalties(ids, Dry(1.0, breakers=None, range=6)) == {}


@pytest.mark.parametrize(
    ("texts", "ids", "expected"),
    [
        ((), [0, 4, 1, 3, 0, 4, 1], {3: 1.75}),
        (("\n",), [0, 4, 1, 3, 0, 4, 1], {}),  # one token is left of the repeat
        (("\n",), [0, 5, 1, 3, 0, 5, 1], {}),  # inside of a longer token
        (("<br>",), [6, 7, 8, 1, 3, 6, 7, 8, 1], {}),  # across three tokens
        (("<br>",), [9, 8, 1, 3, 9, 8, 1], {}),  # begins inside of a token
        (("<br>",), [9, 7, 1, 3, 9, 7, 1], {3: 1.75}),  # not complete
        (("<br>",), [9, 8, 1, 3, 8, 1], {}),  # complete in the earlier copy alone
        (("<br>",), [8, 1, 3, 9, 8, 1], {}),  # in the later one
        (("\u00e9",), [10, 11, 1, 3, 10, 11, 1], {}),  # one character, two tokens
        (("\n",), [0, 1, 4, 0, 1], {}),  # the breaker itself is never made unlikely
        (("\n",), [4, 4, 4, 4], {}),
    ],
)
def test_breakers(texts: tuple[str, ...], ids: list[int], expected: dict[int, float]) -> None:
    assert penalties(ids, Dry(1.0, breakers=breakers(*texts))) == pytest.approx(expected)


def test_ids_can_break() -> None:
    ids = [0, 4, 1, 3, 0, 4, 1]
    wanted = Breakers((), VOCAB.__getitem__, frozenset({4}))
    assert penalties(ids, Dry(1.0, breakers=wanted)) == {}
