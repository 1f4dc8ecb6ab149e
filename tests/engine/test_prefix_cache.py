"""What is found has the same tokens before it, in the same scope."""

from __future__ import annotations

import numpy as np
import pytest

from squall.engine.prefix_cache import PrefixCache
from squall.engine.request import CacheScope

BLOCKS, SIZE = 24, 4
SCOPES = [
    CacheScope(),
    CacheScope(tenant="a"),
    CacheScope(adapter="a"),
    CacheScope(images=(b"a",)),
    CacheScope(images=(b"a", b"")),
]


def keys_of(cache: PrefixCache, tokens: list[int], scope: CacheScope = SCOPES[0]) -> list[bytes]:
    keys: list[bytes] = []
    cache.extend(keys, tokens, scope)
    return keys


def test_random_sequences_find_only_their_own_prefix(rng: np.random.Generator) -> None:
    cache = PrefixCache(BLOCKS, SIZE, limit=10)
    contents: dict[int, tuple[CacheScope, list[int]]] = {}
    stems = rng.integers(9, size=(2, 30)).tolist()
    hits = 0
    for _ in range(2000):
        scope = SCOPES[rng.integers(len(SCOPES))]
        tokens = stems[rng.integers(2)][: rng.integers(30)] + rng.integers(9, size=2).tolist()
        keys = keys_of(cache, tokens, scope)
        assert len(keys) == len(tokens) // SIZE
        blocks = cache.find(keys)
        for i, block in enumerate(blocks):
            assert contents[block] == (scope, tokens[: (i + 1) * SIZE])
            cache.pool.share(block)
        hits += len(blocks)
        for i in range(len(blocks), len(keys)):
            blocks.append(cache.pool.take())
            contents[blocks[-1]] = (scope, tokens[: (i + 1) * SIZE])
            cache.store(keys[i], blocks[-1])
        cache.check()
        cache.release(blocks)
        cache.check()
        if not rng.integers(100):
            cache.clear()
            assert not cache.find(keys)
            cache.check()
    assert hits > 100


def test_the_end_of_a_sequence_is_forgotten_first() -> None:
    cache = PrefixCache(8, SIZE, limit=3)
    keys = keys_of(cache, list(range(20)))
    blocks = [cache.pool.take() for _ in keys]
    for key, block in zip(keys, blocks, strict=True):
        cache.store(key, block)
    cache.release(blocks)
    assert cache.find(keys) == blocks[:3]


def test_keys_are_secret() -> None:
    one, other = (keys_of(PrefixCache(1, SIZE, limit=1), [1, 2, 3, 4]) for _ in range(2))
    assert one != other


@pytest.mark.parametrize("scope", SCOPES[1:])
def test_scopes_differ(scope: CacheScope) -> None:
    """security row 17: another tenant, adapter or image finds nothing; the same one does."""
    cache = PrefixCache(8, SIZE, limit=8)
    mine = keys_of(cache, [1, 2, 3, 4], scope)
    assert mine == keys_of(cache, [1, 2, 3, 4], scope)
    assert all(mine != keys_of(cache, [1, 2, 3, 4], o) for o in SCOPES if o != scope)


def test_off() -> None:
    cache = PrefixCache(8, SIZE, limit=0)
    assert keys_of(cache, [1] * 20) == []
