"""The context that is chosen, and what is said when none fits."""

from __future__ import annotations

import pytest

from squall.engine import memory
from squall.errors import InvalidRequest, OutOfMemory

MIB = 2**20


def choose(wanted: int | None, *, trained: int = 32768, weight_bytes: int = 0) -> int:
    return memory.choose_context(
        wanted, trained=trained, bytes_per_token=MIB, weight_bytes=weight_bytes
    )


@pytest.mark.parametrize(
    ("free_mib", "weight_mib", "trained", "chosen"),
    [
        (None, 0, 32768, 8192),
        (None, 0, 2048, 2048),
        (10**9, 0, 32768, 8192),
        (4000, 1000, 32768, 1500),
        (1000, 0, 128, 128),
    ],
)
def test_default(
    monkeypatch: pytest.MonkeyPatch,
    free_mib: int | None,
    weight_mib: int,
    trained: int,
    chosen: int,
) -> None:
    free = None if free_mib is None else free_mib * MIB
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    assert choose(None, trained=trained, weight_bytes=weight_mib * MIB) == chosen


def test_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 20000 * MIB)
    assert choose(16384) == 16384
    with pytest.raises(InvalidRequest, match="1 to 32768"):
        choose(32769)
    with pytest.raises(OutOfMemory, match="memory for 20000 tokens"):
        choose(20001)


def test_this_machine() -> None:
    free = memory.available_bytes()
    assert free is None or 0 <= free < 2**50
