"""What is found has the same tokens before it, in the same scope."""

from __future__ import annotations

import numpy as np
import pytest
from invariants import check_cache

from squall.engine.prefix_cache import PrefixCache
from squall.engine.request import CacheScope, Request, Span
from squall.engine.sampling import Sampling
from squall.engine.sequence import Sequence

BLOCKS, SIZE = 24, 4
SCOPES = [
    CacheScope(),
    CacheScope(tenant="a"),
    CacheScope(adapter="a"),
    CacheScope(tenant="a", adapter="a"),
    CacheScope(tenant="aa"),
]
GREEDY = Sampling(temperature=0, seed=0)


def keys_of(
    cache: PrefixCache,
    tokens: list[int],
    scope: CacheScope = SCOPES[0],
    spans: tuple[Span, ...] = (),
) -> list[bytes]:
    request = Request(ids=tokens, sampling=GREEDY, scope=scope, spans=spans)
    sequence = Sequence(request, 0, tokens, len(tokens) - 1, spans)
    cache.extend(sequence)
    return sequence.keys


def shared(one: tuple[Span, ...], other: tuple[Span, ...]) -> int:
    """How many of the six blocks of one prompt are found for another with the same ids."""
    cache = PrefixCache(12, SIZE, limit=12)
    for key in keys_of(cache, [5] * 24, spans=one):
        cache.store(key, cache.pool.take())
    return len(cache.find(keys_of(cache, [5] * 24, spans=other)))


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
        check_cache(cache)
        cache.release(blocks)
        check_cache(cache)
        if not rng.integers(100):
            cache.clear()
            assert not cache.find(keys)
            check_cache(cache)
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
    """security row 17: another tenant or adapter finds nothing; the same one does."""
    cache = PrefixCache(8, SIZE, limit=8)
    mine = keys_of(cache, [1, 2, 3, 4], scope)
    assert mine == keys_of(cache, [1, 2, 3, 4], scope)
    assert all(mine != keys_of(cache, [1, 2, 3, 4], o) for o in SCOPES if o != scope)


def test_off() -> None:
    cache = PrefixCache(8, SIZE, limit=0)
    assert keys_of(cache, [1] * 20) == []


@pytest.mark.parametrize(
    ("start", "stop", "found"),
    [(8, 12, 2), (9, 10, 2), (11, 23, 2), (8, 24, 2), (0, 4, 0), (3, 5, 0), (20, 24, 5)],
)
def test_a_prefix_hits_up_to_a_span_with_another_digest(start: int, stop: int, found: int) -> None:
    """It begins a block, in the middle of one, or crosses several."""
    span = Span(start, stop, b"cat")
    assert shared((span,), (span,)) == 6
    for other in (Span(start, stop, b"dog"), Span(start, stop, b"cats"), Span(start, stop, b"ca")):
        assert shared((span,), (other,)) == found
    assert shared((span,), ()) == shared((), (span,)) == found


def test_spans_in_one_block() -> None:
    one, other = Span(4, 5, b"a"), Span(6, 7, b"b")
    assert shared((one, other), (one, other)) == 6
    for different in (
        (one,),
        (other,),
        (one, Span(6, 7, b"c")),
        (Span(4, 5, b"b"), Span(6, 7, b"a")),
        (Span(4, 7, b"a"),),
        (Span(5, 6, b"a"), other),
        (one, Span(6, 9, b"b")),
    ):
        assert shared((one, other), different) == 1


def test_a_span_that_is_longer_than_the_first_block_counts_once() -> None:
    """The keys after it differ too, as each key is made from the one before."""
    cache = PrefixCache(12, SIZE, limit=12)
    plain = keys_of(cache, [5] * 24)
    spanned = keys_of(cache, [5] * 24, spans=(Span(2, 18, b"cat"),))
    assert not set(plain) & set(spanned)
    assert len(set(spanned)) == 6


def test_any_text_names_a_tenant() -> None:
    cache = PrefixCache(8, SIZE, limit=8)
    assert keys_of(cache, [1] * 4, CacheScope("\udc80")) != keys_of(cache, [1] * 4, CacheScope("?"))
