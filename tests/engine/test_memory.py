"""The context that is chosen, and what is said when none fits."""

from __future__ import annotations

from typing import Any

import pytest

from squall import Model
from squall.engine import memory
from squall.engine.memory import KvSize
from squall.errors import InvalidRequest, OutOfMemory
from squall.executors.memory import Load
from squall.machine import available_bytes

MIB = 2**20


def holding(free_mib: int | None, weight_mib: int = 0) -> list[Load]:
    """One device, where a token takes 1 MiB."""
    return [Load("cpu", 1, weight_mib * MIB, MIB, None if free_mib is None else free_mib * MIB)]


def choose(wanted: int | None, loads: list[Load], trained: int = 32768) -> int:
    return memory.choose_context(wanted, trained=trained, loads=loads)


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
def test_default(free_mib: int | None, weight_mib: int, trained: int, chosen: int) -> None:
    assert choose(None, holding(free_mib, weight_mib), trained) == chosen


def test_wanted() -> None:
    assert choose(16384, holding(20000)) == 16384
    with pytest.raises(InvalidRequest, match="1 to 32768"):
        choose(32769, holding(20000))
    with pytest.raises(OutOfMemory, match="memory for 20000 tokens"):
        choose(20001, holding(20000))


def test_the_fullest_device_decides() -> None:
    """Each device has the layers' part of the KV cache, and all tokens have to be on each."""
    loads = [
        Load("cuda:0", 10, 1000 * MIB, MIB // 2, 3000 * MIB),
        Load("cpu", 10, 5000 * MIB, MIB // 2, 10000 * MIB),
    ]
    assert choose(None, loads) == 2000
    assert choose(4000, loads) == 4000
    with pytest.raises(OutOfMemory, match=r"4001 MiB .* memory of cuda:0 for 4000 tokens"):
        choose(4001, loads)
    assert kv(KvSize(bytes=700 * MIB), loads) == 700
    assert kv(KvSize(fraction=0.5), loads) == 2000
    with pytest.raises(OutOfMemory, match="of cuda:0 for 4000 tokens"):
        kv(KvSize(tokens=5000), loads)


def kv(wanted: KvSize, loads: list[Load], *, context: int = 8192, max_seqs: int = 16) -> int:
    return memory.choose_kv_tokens(wanted, context=context, max_seqs=max_seqs, loads=loads)


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
    free_mib: int | None, context: int, max_seqs: int, tokens: int
) -> None:
    loads = holding(free_mib, 1000)
    assert kv(KvSize(), loads, context=context, max_seqs=max_seqs) == tokens


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
def test_size_of_the_kv_cache(wanted: dict[str, Any], tokens: int) -> None:
    assert kv(KvSize(**wanted), holding(20000, 1000)) == tokens


def test_the_smallest_block_of_mistral_rs() -> None:
    assert KvSize(block_size=8) == KvSize(block_size=16)


@pytest.mark.parametrize("wanted", [{"tokens": 20001}, {"bytes": 20001 * MIB}, {"bytes": 5}])
def test_a_kv_cache_that_does_not_fit(wanted: dict[str, int]) -> None:
    with pytest.raises(OutOfMemory, match="memory"):
        kv(KvSize(**wanted), holding(20000))


@pytest.mark.parametrize(
    "wanted",
    [
        {"tokens": 0}, {"bytes": -1}, {"fraction": 0.0}, {"fraction": 1.1},
        {"fraction": float("nan")}, {"block_size": 4}, {"block_size": 24}, {"block_size": 0},
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
    free = available_bytes()
    assert free is None or 0 <= free < 2**50


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/box", {"box/memory.max": "1000", "box/memory.current": "900"}),
        (
            "5:cpu,memory:/box",
            {"memory/box/memory.limit_in_bytes": "1000", "memory/box/memory.usage_in_bytes": "900"},
        ),
    ],
)
def test_pages_of_files_make_room_in_a_container(
    monkeypatch: pytest.MonkeyPatch, group: str, files: dict[str, str]
) -> None:
    """What a model's file has in the page cache is counted as used, and is there to be taken."""
    stat = "anon 200\nfile 700\ninactive_file 500\nactive_file 100\nslab 9\n"
    stat += "total_inactive_file 500\ntotal_active_file 100\n"
    known = {f"/sys/fs/cgroup/{name}": text for name, text in files.items()}
    known |= {"/proc/self/cgroup": group}
    where = next(iter(files)).rpartition("/")[0]
    found = []
    for text in ("", stat):
        told = known | {f"/sys/fs/cgroup/{where}/memory.stat": text}
        monkeypatch.setattr("squall.machine._read", lambda path, told=told: told.get(str(path), ""))
        found.append(available_bytes())
    assert found == [100, 700]
