"""The context that is chosen, and what is said when none fits."""

from __future__ import annotations

from typing import Any

import pytest

from squall import Model
from squall.engine import memory
from squall.engine.memory import KvSize
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


def kv(wanted: KvSize, *, context: int = 8192, max_seqs: int = 16, weight_mib: int = 0) -> int:
    return memory.choose_kv_tokens(
        wanted,
        context=context,
        max_seqs=max_seqs,
        bytes_per_token=MIB,
        weight_bytes=weight_mib * MIB,
    )


@pytest.mark.parametrize(
    ("free_mib", "context", "max_seqs", "tokens"),
    [
        (None, 8192, 16, 32768),
        (10**9, 8192, 16, 32768),
        (10**9, 512, 16, 8192),
        (10**9, 8192, 1, 8192),  # one context, always
        (20000, 8192, 16, 9500),  # half of what 1000 MiB of weights leave
        (10000, 8192, 16, 8192),
    ],
)
def test_row_31_default_of_the_kv_cache(
    monkeypatch: pytest.MonkeyPatch,
    free_mib: int | None,
    context: int,
    max_seqs: int,
    tokens: int,
) -> None:
    free = None if free_mib is None else free_mib * MIB
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    assert kv(KvSize(), context=context, max_seqs=max_seqs, weight_mib=1000) == tokens


@pytest.mark.parametrize(
    ("wanted", "tokens"),
    [
        ({"tokens": 5000}, 5000),
        ({"bytes": 700 * MIB + 5}, 700),
        ({"fraction": 0.25}, 4750),
        ({"fraction": 1.0}, 19000),
        # As in mistral.rs, a fraction counts before a number of tokens, and that before bytes.
        ({"fraction": 0.5, "tokens": 5000, "bytes": MIB}, 9500),
        ({"tokens": 5000, "bytes": MIB}, 5000),
    ],
)
def test_size_of_the_kv_cache(
    monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any], tokens: int
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 20000 * MIB)
    assert kv(KvSize(**wanted), weight_mib=1000) == tokens


@pytest.mark.parametrize("wanted", [{"tokens": 20001}, {"bytes": 20001 * MIB}, {"bytes": 5}])
def test_a_kv_cache_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, wanted: dict[str, int]
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 20000 * MIB)
    with pytest.raises(OutOfMemory, match="memory"):
        kv(KvSize(**wanted))


@pytest.mark.parametrize(
    "wanted",
    [
        {"tokens": 0}, {"bytes": -1}, {"fraction": 0.0}, {"fraction": 1.1},
        {"fraction": float("nan")}, {"block_size": 8}, {"block_size": 24}, {"block_size": 0},
        {"block_size": 2048},
    ],
)  # fmt: skip
def test_sizes_that_make_no_sense(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"(fraction|tokens|bytes|block_size) is"):
        KvSize(**wanted)


@pytest.mark.parametrize("block_size", [32, 48])
def test_answers_do_not_depend_on_the_size(block_size: int) -> None:
    ids = list(range(100, 170))
    with Model.open(context=128) as model:
        expected = model.logits(ids)
    with Model.open(kv=KvSize(bytes=4 * MIB, block_size=block_size)) as model:
        # The context is not longer than what there is room for.
        assert 100 < model.context < 300
        assert model.engine.capacity == model.context
        assert (model.logits(ids) == expected).all()


def test_this_machine() -> None:
    free = memory.available_bytes()
    assert free is None or 0 <= free < 2**50
