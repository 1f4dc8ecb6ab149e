"""KV blocks: who uses which, and which tokens they hold after which. Ints only.

Prefixes found again are not computed again.
That is exact, not approximate: a row's result does not depend on how rows were cut into steps.
Only full blocks are found and shared, so a shared block is never written.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Reversible

from squall.engine.request import CacheScope
from squall.engine.sequence import Sequence


class BlockPool:
    """Blocks 0 to `size - 1`, each free, used (by one or several), or kept.

    A kept block is used by nobody and still holds something worth finding again; at most `keep`
    are. They are taken when no free one is left, the one that is unused for longest first; then,
    as when there are too many, `on_evict` is told.
    """

    def __init__(self, size: int, *, keep: int = 0, on_evict: Callable[[int], None]) -> None:
        self.size = size
        self._keep = keep
        self._on_evict = on_evict
        self._users = [0] * size
        self._free = list(range(size - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """How many of the available blocks hold something."""
        return len(self._kept)

    def take(self) -> int:
        """A block for one user; what it held is forgotten. There must be one available."""
        if not self._free:
            self._evict()
        block = self._free.pop()
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a used or kept block."""
        if not self._users[block]:
            del self._kept[block]
        self._users[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """One user less; after the last, `keep` says whether it holds something."""
        self._users[block] -= 1
        if self._users[block]:
            return
        if not keep:
            self._free.append(block)
            return
        self._kept[block] = None
        if len(self._kept) > self._keep:
            self._evict()

    def evict_all(self) -> None:
        while self._kept:
            self._evict()

    def _evict(self) -> None:
        block, _ = self._kept.popitem(last=False)
        self._on_evict(block)
        self._free.append(block)


class PrefixCache:
    """Keys of full blocks. A key stands for the scope, and for tokens and spans to the block's end.

    Keys are a chain of SHA-256 from a secret of this cache, so that nobody can make two prefixes
    collide. limit: how many blocks that nobody uses are kept; 0 turns the cache off.
    """

    def __init__(self, blocks: int, block_size: int, *, limit: int) -> None:
        self.enabled = limit > 0
        self.block_size = block_size
        self.pool = BlockPool(blocks, keep=limit, on_evict=self._forget)
        self._secret = secrets.token_bytes(32)
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._format = struct.Struct(f"<{block_size}i")

    def extend(self, sequence: Sequence) -> None:
        """Add to its keys until there is one for each full block of its tokens.

        A span counts in the block where it begins; what comes before may be found without it.
        """
        if not self.enabled or sequence.request.whole:
            return
        size, keys, tokens = self.block_size, sequence.keys, sequence.tokens
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            hashed = hashlib.sha256(keys[-1] if keys else self._root(sequence.request.scope))
            hashed.update(self._format.pack(*tokens[start : start + size]))
            for span in sequence.spans:
                if start <= span.start < start + size:
                    # As Python writes it: no two differ and look the same, nor do two in a row.
                    known = (span.start - start, span.stop - start, span.digest)
                    hashed.update(repr(known).encode())
            keys.append(hashed.digest())

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix. They may be evicted unless shared at once."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def store(self, key: bytes, block: int) -> None:
        """`block`, which is in use, now holds what `key` stands for."""
        # The same tokens may have been computed twice at once; one copy is enough.
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys[block] = key

    def release(self, blocks: Reversible[int]) -> None:
        """The user of a sequence's blocks leaves; those with a key are kept for the next."""
        # The last block is of use only behind the others, so it is the first to be evicted.
        for block in reversed(blocks):
            self.pool.release(block, keep=block in self._keys)

    def clear(self) -> None:
        """Forget every prefix, those in use too."""
        self.pool.evict_all()
        self._blocks.clear()
        self._keys.clear()

    def _forget(self, block: int) -> None:
        del self._blocks[self._keys.pop(block)]

    def _root(self, scope: CacheScope) -> bytes:
        return hmac.digest(self._secret, repr(scope).encode(), "sha256")
