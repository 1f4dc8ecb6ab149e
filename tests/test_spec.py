"""Rope frequencies against transformers' own, and the immutability of a Spec."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from squall.spec import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

DIMS = 64
SHORT, LONG = (1.0, 1.5) * 16, (2.0, 3.0) * 16
SCALINGS: dict[str, tuple[RopeScaling | None, dict[str, Any]]] = {
    "linear": (LinearScaling(4.0), {"factor": 4.0}),
    "llama3": (
        Llama3Scaling(8.0, 1.0, 4.0, 8192),
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        YarnScaling(4.0, 4096),
        {"factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    "yarn own": (
        YarnScaling(4.0, 4096, 16.0, 2.0, 1.2),
        {
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.2,
        },
    ),
    "longrope": (
        FactorScaling(SHORT, LONG, 4096, 1.1),
        {
            "short_factor": SHORT,
            "long_factor": LONG,
            "original_max_position_embeddings": 4096,
            "factor": 32.0,
            "attention_factor": 1.1,
        },
    ),
}


@pytest.mark.parametrize("context", [2048, 100_000])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_frequencies_equal_transformers(name: str, theta: float, context: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, parameters = SCALINGS[name]
    config = SimpleNamespace(
        head_dim=DIMS,
        hidden_size=DIMS,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters=parameters | {"rope_theta": theta},
        standardize_rope_params=lambda: None,
    )
    function = ROPE_INIT_FUNCTIONS[name.split()[0]]
    wanted, magnitude = function(config, seq_len=context)
    found = Rope(theta, DIMS, scaling=scaling).frequencies(context)
    assert found[0] == pytest.approx(wanted.tolist(), rel=1e-5)
    assert found[1] == pytest.approx(magnitude)


def test_unscaled_frequencies() -> None:
    assert Rope(100.0, 4).frequencies(10) == ((1.0, pytest.approx(0.1)), 1.0)


def test_a_spec_is_hashable_and_frozen() -> None:
    rope = Rope(1e4, 64, scaling=LinearScaling(2.0))
    assert hash(rope) == hash(dataclasses.replace(rope))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rope.theta = 1.0  # type: ignore[misc]
