"""KV blocks: who uses which, how often, and which may be taken next. Ints only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


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
