"""Every block is free, used or kept, whatever is done in whatever order."""

from __future__ import annotations

import numpy as np
from invariants import check_pool

from squall.engine.prefix_cache import BlockPool

SIZE, KEEP = 12, 5


def test_random_use(rng: np.random.Generator) -> None:
    evicted: list[int] = []
    pool = BlockPool(SIZE, keep=KEEP, on_evict=evicted.append)
    users: list[int] = []
    kept: list[int] = []  # the one unused for longest first
    for _ in range(3000):
        evicted.clear()
        match rng.integers(4):
            case 0 if pool.available:
                block = pool.take()
                assert block not in users
                assert evicted in ([], kept[:1])
                users.append(block)
            case 1 if users:
                block = users.pop(rng.integers(len(users)))
                keep = bool(rng.integers(2))
                pool.release(block, keep=keep)
                kept += [block] * (keep and block not in users)
            case 2 if users or kept:
                block = int(rng.choice(users + kept))
                pool.share(block)
                users.append(block)
                kept = [other for other in kept if other != block]
            case 3 if not rng.integers(50):
                pool.evict_all()
        kept = [block for block in kept if block not in evicted]
        check_pool(pool)
        assert [pool._users[block] for block in range(SIZE)] == [
            users.count(block) for block in range(SIZE)
        ]
        assert (pool.kept, pool.available) == (len(kept), SIZE - len(set(users)))


def test_free_blocks_go_before_kept_ones() -> None:
    evicted: list[int] = []
    pool = BlockPool(3, keep=3, on_evict=evicted.append)
    blocks = [pool.take() for _ in range(3)]
    pool.release(blocks[1], keep=True)
    pool.release(blocks[0], keep=True)
    pool.release(blocks[2], keep=False)
    assert [pool.take() for _ in range(3)] == [blocks[2], blocks[1], blocks[0]]
    assert evicted == [blocks[1], blocks[0]]
