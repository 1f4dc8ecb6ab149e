"""What loading a model costs and tells."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest

from squall import Model
from squall.checkpoints import open_gguf
from squall.locate import locate

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(kind: str) -> int:
    """Bytes of this process in memory: RssAnon or RssFile."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == kind:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"no {kind}")


def test_progress_counts_the_bytes_of_the_weights() -> None:
    told: list[tuple[int, int]] = []
    with Model.open(context=256, progress=lambda *pair: told.append(pair)) as model:
        stored = sum(tensor.nbytes for tensor in model.checkpoint.tensors.values())
    done = [count for count, _ in told]
    assert {whole for _, whole in told} == {stored}
    assert done[-1] == stored
    assert done == sorted(set(done))


def test_released_pages_are_read_again() -> None:
    tensor = max(open_gguf(locate(None)).tensors.values(), key=lambda tensor: tensor.nbytes)
    before = tensor.data.copy()
    assert tensor.pages is not None
    tensor.pages.release()
    tensor.pages.fetch()
    np.testing.assert_array_equal(tensor.data, before)


@linux
def test_the_file_does_not_stay_in_memory_beside_the_weights() -> None:
    gc.collect()
    file, anon = resident("RssFile"), resident("RssAnon")
    with Model.open(context=256) as model:
        size = model.checkpoint.size_bytes
        assert resident("RssFile") - file < size // 4
        assert resident("RssAnon") - anon < 1.1 * size + (64 << 20)
        sum(int(tensor.data[::4096].sum()) for tensor in model.checkpoint.tensors.values())
        assert resident("RssFile") - file > size // 2


@linux
def test_a_large_kv_cache_takes_memory_as_it_is_used() -> None:
    """Even where pages are huge: 700 MiB of cache, and one block of it is used."""
    with Model.open(context=2048, kv_tokens=16 * 2048) as model:
        before = resident("RssAnon")
        model.logits([5])
        used, reserved = resident("RssAnon") - before, model.executor.kv_bytes
        assert reserved > 600 << 20
        assert used < reserved / 3
