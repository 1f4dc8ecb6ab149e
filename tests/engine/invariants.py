"""What is always true of blocks, prefixes and the scheduler, between any two steps."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from squall.engine.prefix_cache import BlockPool, PrefixCache
from squall.engine.scheduler import Scheduler


def check_pool(pool: BlockPool) -> None:
    """Every block is in exactly one state."""
    unused = [block for block in range(pool.size) if not pool._users[block]]
    assert sorted([*pool._free, *pool._kept]) == unused
    assert min(pool._users, default=0) >= 0
    assert len(pool._kept) <= pool._keep


def check_cache(cache: PrefixCache) -> None:
    """Keys and blocks are one to one, and what is kept has a key."""
    check_pool(cache.pool)
    assert {block: key for key, block in cache._blocks.items()} == cache._keys
    kept = [block for block in cache._keys if not cache.pool._users[block]]
    assert len(kept) == cache.pool.kept


def check_scheduler(scheduler: Scheduler) -> None:
    """Blocks have as many users as sequences that name them; limits and order hold."""
    check_cache(scheduler.cache)
    pool, size = scheduler.cache.pool, scheduler.cache.block_size
    waiting, running = scheduler.waiting, scheduler.running
    users = Counter(chain.from_iterable(sequence.blocks for sequence in running))
    assert all(pool._users[block] == users[block] for block in range(pool.size))
    assert len(running) <= scheduler.limits.requests
    for queue in (waiting, running):
        assert sorted(queue, key=lambda sequence: sequence.number) == queue
    assert scheduler.waiting_tokens == sum(len(sequence.tokens) for sequence in waiting)
    for sequence in waiting:
        assert not sequence.blocks
        assert not sequence.guesses
        assert sequence.computed == sequence.stored == 0
    for sequence in running:
        needed = -(-(len(sequence.tokens) + len(sequence.guesses)) // size)
        assert sequence.computed <= min(len(sequence.tokens), len(sequence.blocks) * size)
        assert len(sequence.blocks) == needed or not sequence.guesses
        assert sequence.stored <= len(sequence.blocks) <= needed
        assert scheduler.limits.recompute or sequence.stored * size <= sequence.computed
        # Nobody else sees what is not known to be right.
        assert all(pool._users[block] == 1 for block in sequence.blocks[sequence.stored :])
    assert set(map(id, scheduler._promised.values())) <= set(map(id, running))
