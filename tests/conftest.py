"""Shared fixtures."""

from __future__ import annotations

import os
import secrets

import numpy as np
import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers every run; a failure shows the seed that repeats it."""
    seed = int(os.environ.get("SQUALL_TEST_SEED") or secrets.randbits(63))
    request.node.add_report_section("setup", "seed", f"repeat with SQUALL_TEST_SEED={seed}")
    return np.random.default_rng(seed)
