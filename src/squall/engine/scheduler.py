"""What the next step computes. There is no prefill and no decode: tokens are known or computed.

A request that runs has KV blocks for all its known tokens. Those with one pending token go first,
a row each; then prompts get what the pace of the others allows. Ints only.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import Counter
from dataclasses import dataclass
from itertools import chain

from squall.engine.prefix_cache import PrefixCache
from squall.engine.request import Progress

SHARED_S = 0.08
ALONE_S = 0.5
FIRST_ROWS = 64
LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one step: requests, rows, and rows whose logits are told.

    rows is also the largest chunk of a prompt. recompute: nothing stays in the KV cache between
    tokens.
    """

    requests: int
    rows: int
    outputs: int
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens `start:stop` of a request; `outputs` are those whose logits are wanted."""

    of: Progress
    start: int
    stop: int
    outputs: range


class Pace:
    """How many rows of prompts a step may have, so that running answers keep theirs.

    A step lasts about `SHARED_S` if an answer waits for its next token, and otherwise about
    `ALONE_S`, so that who comes or leaves is noticed soon.
    """

    def __init__(self) -> None:
        self._row_s: float | None = None

    def rows(self, limit: int, *, alone: bool) -> int:
        """At least `LEAST_ROWS`, at most `limit`."""
        if self._row_s is None:
            return limit if alone else min(limit, FIRST_ROWS)
        rows = int((ALONE_S if alone else SHARED_S) / self._row_s)
        return min(limit, max(rows, LEAST_ROWS))

    def observe(self, rows: int, seconds: float) -> None:
        """A step had so many rows and took so long."""
        if rows >= LEAST_ROWS:
            row_s = max(seconds, 1e-9) / rows
            self._row_s = row_s if self._row_s is None else (self._row_s + row_s) / 2


class Scheduler:
    """Owns what waits and what runs, both in order of arrival, and their blocks.

    First come, first served: nothing overtakes a request that waits for blocks, and when a running
    answer needs one and there is none, the youngest gives up its own and is computed again later.
    """

    def __init__(self, cache: PrefixCache, limits: Limits) -> None:
        self.cache = cache
        self.limits = limits
        self.pace = Pace()
        self.waiting: list[Progress] = []
        self.running: list[Progress] = []
        self.waiting_tokens = 0
        self.preemptions = 0
        # Who is about to compute the block of a key; whoever wants it too waits for it.
        self._promised: dict[bytes, Progress] = {}

    def add(self, request: Progress) -> None:
        """A new or preempted request waits for its turn."""
        insort(self.waiting, request, key=_number)
        self.waiting_tokens += len(request.tokens)

    def remove(self, request: Progress) -> None:
        """The request is over; its blocks are free at once."""
        if request.blocks:
            self.running.remove(request)
            self._give_up_blocks(request)
        else:
            self._unqueue(request)

    def plan(self) -> list[Chunk]:
        """The chunks of the next step; empty only if nothing runs or waits."""
        self._grow()
        self._admit()
        limits = self.limits
        chunks = [self._chunk(r, 1, 0) for r in self.running if r.pending == 1]
        more = [r for r in self.running if r.pending > 1]
        # Every running request may have one output; the rest is for those that want several.
        outputs = limits.outputs - len(self.running)
        rows = self.pace.rows(limits.rows, alone=not chunks)
        rows = min(rows, limits.rows - len(chunks))
        for request in more:
            # The oldest gets half, so that it is done soon; the next gets half of the rest.
            share = rows if request is more[-1] else max(rows // 2, LEAST_ROWS)
            if rows:
                chunk = self._chunk(request, min(share, rows), outputs)
                chunks.append(chunk)
                rows -= chunk.stop - chunk.start
                outputs -= max(len(chunk.outputs) - 1, 0)
        return chunks

    def advance(self, chunk: Chunk) -> bool:
        """The chunk was computed; whether all known tokens now are, so that one can be sampled."""
        request = chunk.of
        if chunk.outputs:
            request.scored = chunk.outputs.stop
            if request.scored < chunk.stop:
                return False  # the same rows again, for the logits of the rest of them
        request.computed = chunk.stop
        full = chunk.stop // self.cache.block_size
        if full > request.stored:
            self._store(request, full)
        done = request.pending == 0
        if done and self.limits.recompute:
            request.computed = 0
        return done

    def restart(self) -> None:
        """Forget all that was computed: running requests begin again, and no prefix is known."""
        for request in tuple(self.running):
            self._preempt(request)
        self.cache.clear()

    def _chunk(self, request: Progress, rows: int, outputs: int) -> Chunk:
        """A chunk of at most `rows`, with at most `outputs` beside the request's own one."""
        start = request.computed
        stop = min(start + rows, len(request.tokens), start + (request.request.chunk or rows))
        first = max(start, request.scored)
        if first >= stop:
            return Chunk(request, start, stop, range(stop, stop))
        wanted = range(first, min(stop, first + outputs + 1))
        return Chunk(request, start, stop if request.request.chunk else wanted.stop, wanted)

    def _grow(self) -> None:
        """Give running requests room for the token they got; the youngest may have to leave."""
        size = self.cache.block_size
        for request in tuple(self.running):
            while len(request.blocks) * size < len(request.tokens) and request in self.running:
                if self.cache.pool.available:
                    request.blocks.append(self.cache.pool.take())
                else:
                    self._preempt(self.running[-1])

    def _preempt(self, request: Progress) -> None:
        self.remove(request)
        self.add(request)
        self.preemptions += 1

    def _admit(self) -> None:
        """Let waiting requests run, in order, as far as there are blocks."""
        if not self.waiting:
            return
        for request in self.waiting[: self.limits.requests]:
            if len(self.running) == self.limits.requests:
                return
            self.cache.extend(request.keys, request.tokens, request.request.scope)
            # At least the token is computed whose logits are the first that are wanted.
            useful = request.keys[: request.scored // self.cache.block_size]
            found = self.cache.find(useful)
            if len(found) < len(useful) and useful[len(found)] in self._promised:
                continue
            if not self._take_blocks(request, found):
                return
            self._unqueue(request)
            insort(self.running, request, key=_number)

    def _take_blocks(self, request: Progress, found: list[int]) -> bool:
        """Blocks for all tokens, `found` among them, if that leaves each running request one."""
        pool = self.cache.pool
        for block in found:
            pool.share(block)
        needed = -(-len(request.tokens) // self.cache.block_size) - len(found)
        if pool.available < needed + len(self.running):
            self.cache.release(found)
            return False
        request.blocks = array("i", [*found, *(pool.take() for _ in range(needed))])
        request.stored = len(found)
        request.computed = len(found) * self.cache.block_size
        for key in request.keys[len(found) :]:
            self._promised.setdefault(key, request)
        return True

    def _store(self, request: Progress, full: int) -> None:
        """The first `full` blocks are computed; others may use them."""
        self.cache.extend(request.keys, request.tokens, request.request.scope)
        done = slice(request.stored, full)
        for key, block in zip(request.keys[done], request.blocks[done], strict=False):
            self.cache.store(key, block)
            self._keep_promise(key, request)
        request.stored = full

    def _give_up_blocks(self, request: Progress) -> None:
        self.cache.release(request.blocks)
        for key in request.keys[request.stored :]:
            self._keep_promise(key, request)
        request.blocks = array("i")
        request.stored = request.computed = 0

    def _keep_promise(self, key: bytes, request: Progress) -> None:
        if self._promised.get(key) is request:
            del self._promised[key]

    def _unqueue(self, request: Progress) -> None:
        self.waiting.remove(request)
        self.waiting_tokens -= len(request.tokens)

    def check(self) -> None:
        """Blocks have as many users as requests that name them; limits and order hold."""
        self.cache.check()
        pool, size = self.cache.pool, self.cache.block_size
        users = Counter(chain.from_iterable(request.blocks for request in self.running))
        assert all(pool.users(block) == users[block] for block in range(pool.size))
        assert len(self.running) <= self.limits.requests
        for queue in (self.waiting, self.running):
            assert sorted(queue, key=_number) == queue
        assert self.waiting_tokens == sum(len(request.tokens) for request in self.waiting)
        for request in self.waiting:
            assert not request.blocks
            assert request.computed == request.stored == 0
        for request in self.running:
            assert request.computed <= len(request.blocks) * size
            assert request.stored <= len(request.blocks)
        assert set(map(id, self._promised.values())) <= set(map(id, self.running))


def _number(request: Progress) -> int:
    return request.number
