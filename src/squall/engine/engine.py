"""The engine: one thread that runs steps for all requests there are, and what others say to it."""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count

from squall.engine.fields import check_fields, real, whole
from squall.engine.prefix_cache import PrefixCache
from squall.engine.reply import Reply, Sink
from squall.engine.request import Request, Span
from squall.engine.scheduler import Limits, Scheduler
from squall.engine.sequence import Sequence
from squall.engine.speculation import Speculation
from squall.engine.stepping import Counts, Stepper
from squall.errors import (
    ContextLengthExceeded,
    EngineStopped,
    InvalidRequest,
    OutOfMemory,
    QueueFull,
)
from squall.executors import Executor
from squall.machine import after_fork
from squall.text.stream import TextStream

# The thread ends when there was nothing to do for so long; the next request starts another.
IDLE_S = 1.0
# What truncation leaves for an answer of no stated length.
ANSWER_ROOM = 10
FORKED = "this process was forked after the model was opened; open it again here"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How many requests, and what is kept.

    no_kv_cache: compute every token anew in every step.
    """

    max_seqs: int = whole("Requests that run at a time.", default=16, least=1)
    max_queue: int = whole("How many more may wait; what comes then is refused.", default=256)
    max_queue_tokens: int = whole("The prompt tokens of those that wait.", default=2**20)
    queue_timeout_s: float | None = real("What has waited so long is refused too.")
    prompt_batchsize: int | None = whole("At most so many tokens of prompts a step.", least=1)
    prefix_cache_n: int = whole(
        "Keep prefixes of finished requests, as much as so many whole contexts.", default=16, off=0
    )
    no_kv_cache: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Stats:
    """A moment of the engine.

    blocks_used are those of running requests; blocks_cached, of the others, hold prefixes.
    stalled_s: since when there is something to do and no step has ended; 0 if there is nothing.
    """

    running: int
    waiting: int
    blocks: int
    blocks_used: int
    blocks_cached: int
    preemptions: int
    stalled_s: float
    counts: Counts


class Engine:
    """Answers many requests at a time. Any thread may call it.

    text: makes what turns the tokens of a request into text. stop_ids: the model's end tokens.
    speculation: guesses how answers go on.
    on_death: called on the engine's thread when an error in a step has ended it.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig | None = None,
        *,
        text: Callable[[Request], TextStream],
        stop_ids: frozenset[int] = frozenset(),
        speculation: Speculation | None = None,
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.executor = executor
        self.on_death = on_death
        self.capacity = min(executor.context, executor.blocks * executor.block_size)
        self._text = text
        self._stop_ids = stop_ids
        self._scheduler = _scheduler(executor, config)
        self._stepper = Stepper(self._scheduler, executor.ids, speculation or Speculation(0))
        self._replies = self._stepper.replies
        # The lock guards what other threads touch: from here to `_death`.
        self._lock = threading.Condition()
        self._inbox: list[Reply] = []
        self._cancels: set[Reply] = set()
        self._calls: list[tuple[Callable[[], None], Future[None]]] = []
        self._draining = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self._death: str | None = None
        self._numbers = count()
        self._moved_s = time.monotonic()
        _ENGINES.add(self)

    # ---- from any thread ----

    def submit(self, request: Request, sink: Sink) -> Reply:
        """Queue a request. `sink` gets its pieces, on the engine's thread: it must not block.

        Raises InvalidRequest for ids that the model does not have, ContextLengthExceeded for a
        prompt that never fits, QueueFull, and EngineStopped. A sink that raises ends its request.
        """
        most, largest = self.executor.ids - 1, max(request.ids)
        if largest > most:
            raise InvalidRequest(f"the prompt has the id {largest}; the model's go to {most}")
        if self.executor.whole:
            request = replace(request, whole=True)
        dropped, settles = self._dropped(request), self.executor.settles
        sequence = _sequence(request, next(self._numbers), dropped, settles)
        step = self._scheduler.limits.rows - self._scheduler.limits.requests
        if request.whole and sequence.prompt > step:
            raise InvalidRequest(
                f"the prompt has {sequence.prompt} tokens; a step has room for {step}"
            )
        self._check_spans(request, step)
        room = self.capacity - len(sequence.tokens)
        reply = Reply(
            sequence,
            self._text(request),
            sink,
            max_tokens=room if request.max_tokens is None else min(request.max_tokens, room),
            stop_ids=request.stop_ids | (frozenset() if request.ignore_eos else self._stop_ids),
            on_cancel=self._cancel,
        )
        with self._lock:
            self._check_open()
            self.check_room(len(sequence.tokens))
            self._inbox.append(reply)
            self._wake()
        return reply

    def _check_spans(self, request: Request, step: int) -> None:
        """step: the rows that one may have in a step, whoever else is answered."""
        hidden = self.executor.image_width
        for span in request.spans:
            size = span.stop - span.start
            if span.rows is not None and span.rows.shape != (size, hidden):
                raise InvalidRequest(
                    f"an image has rows of shape {span.rows.shape}, not {(size, hidden)}"
                )
            if span.mutual and size > step:
                raise InvalidRequest(f"an image has {size} rows; a step has room for {step}")

    @property
    def alive(self) -> bool:
        """Whether no step has failed so far."""
        return self._death is None

    def stats(self) -> Stats:
        """A snapshot; its numbers may be of neighbouring moments."""
        pool, scheduler = self._scheduler.cache.pool, self._scheduler
        busy = self._replies or self._inbox
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            blocks=pool.size,
            blocks_used=pool.size - pool.available,
            blocks_cached=pool.kept,
            preemptions=scheduler.preemptions,
            stalled_s=time.monotonic() - self._moved_s if busy else 0.0,
            counts=replace(self._stepper.counts),
        )

    def check_room(self, tokens: int = 0, *, others: int = 0) -> None:
        """Raises QueueFull if a prompt of `tokens` would have no place to run or to wait.

        others: requests that are not here yet. A queue of one request may have any size.
        """
        scheduler, config = self._scheduler, self.config
        with self._lock:
            ahead = len(self._replies) + len(self._inbox) - len(self._cancels) + others
            inbox_tokens = sum(len(reply.sequence.tokens) for reply in self._inbox)
        waiting_tokens = scheduler.waiting_tokens + inbox_tokens
        full = ahead >= config.max_seqs + config.max_queue
        if full or (waiting_tokens and waiting_tokens + tokens > config.max_queue_tokens):
            raise QueueFull(
                f"{ahead} requests run or wait, with {waiting_tokens} prompt tokens to come; "
                f"allowed are {config.max_seqs} + {config.max_queue} requests and "
                f"{config.max_queue_tokens} waiting tokens; try again later",
                retry_after_s=self._retry_after_s(ahead),
            )

    def _retry_after_s(self, ahead: int) -> int:
        """A guess when a request may begin that has so many before it."""
        most = self.config.max_seqs
        return max(1, math.ceil((ahead + 1 - most) / most * self._stepper.service_s))

    def change_model(self, change: Callable[[], None]) -> None:
        """Run `change` on the engine's thread, between steps, and wait for it.

        What was computed before is forgotten, and running requests go on where they are, with all
        their tokens computed anew. If it raises, so does this, and nothing has changed.
        """
        done: Future[None] = Future()
        with self._lock:
            self._check_open()
            self._calls.append((change, done))
            self._wake()
        done.result()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, and wait for those there are; whether all ended in time."""
        with self._lock:
            self._draining = True
            self._wake()
            return self._lock.wait_for(lambda: not (self._inbox or self._replies), timeout_s)

    def close(self) -> None:
        """Cancel what is left and end the thread, after the step it is in."""
        with self._lock:
            self._draining = self._closing = True
            thread = self._thread
            self._lock.notify_all()
        if thread is threading.current_thread():
            return  # it is in a step
        if thread is not None:
            thread.join()
        self._stepper.close()

    def _dropped(self, request: Request) -> int:
        """How many tokens at the beginning of the prompt do not fit."""
        known, answer = len(request.ids), int(request.max_tokens != 0)
        if known + answer <= self.capacity:
            return 0
        if request.truncate:
            wanted = request.max_tokens or ANSWER_ROOM
            room = wanted if wanted < self.capacity else ANSWER_ROOM
            dropped = known - max(self.capacity - room, 1)
            cut = (span.stop for span in request.spans if span.start < dropped < span.stop)
            if (dropped := next(cut, dropped)) < known:
                return dropped
        raise ContextLengthExceeded(
            f"{known} tokens{' and an answer' * answer} do not fit the context of "
            f"{self.capacity} tokens; shorten them, or open the model with a longer context"
        )

    def _check_open(self) -> None:
        if self._death is not None:
            raise EngineStopped(self._death)
        if self._draining:
            raise EngineStopped("the engine is shutting down and takes no more requests")

    def _cancel(self, reply: Reply) -> None:
        with self._lock:
            self._cancels.add(reply)
            self._wake()

    def _wake(self) -> None:
        """There is something to do; the lock is held."""
        self._lock.notify_all()
        if self._thread is None and self._death is None:
            self._moved_s = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="squall-engine", daemon=True)
            self._thread.start()

    # ---- the engine's thread ----

    def _run(self) -> None:
        try:
            while self._receive():
                self._step()
        except BaseException as error:
            self._die(error)

    def _receive(self) -> bool:
        """Take what other threads left here; False if the thread is to end."""
        with self._lock:
            while not (self._replies or self._left_here() or self._closing):
                self._lock.notify_all()
                if not self._lock.wait(IDLE_S) and not self._left_here():
                    self._thread = None
                    return False
                self._moved_s = time.monotonic()
            for reply in self._inbox:
                self._stepper.add(reply)
            cancels = set(self._replies.values()) if self._closing else self._cancels
            self._inbox, self._cancels = [], set()
            calls, self._calls = self._calls, []
        for change, done in calls:
            self._change(change, done)
        for reply in cancels:
            if reply.sequence.number in self._replies:
                self._stepper.end(reply, "cancelled")
        self._refuse_overdue()
        if not self._closing:
            return True
        with self._lock:
            self._thread = None
            self._lock.notify_all()
        return False

    def _refuse_overdue(self) -> None:
        allowed_s = self.config.queue_timeout_s
        if allowed_s is None:
            return
        for sequence in tuple(self._scheduler.waiting):
            reply = self._replies[sequence.number]
            if reply.waited_s() > allowed_s:
                message = f"no place became free within {allowed_s:g} s; try again later"
                retry_after_s = self._retry_after_s(len(self._replies))
                error = QueueFull(message, retry_after_s=retry_after_s)
                self._stepper.end(reply, "error", error)

    def _left_here(self) -> bool:
        return bool(self._inbox or self._cancels or self._calls)

    def _change(self, change: Callable[[], None], done: Future[None]) -> None:
        try:
            change()
        except BaseException as error:
            done.set_exception(error)
        else:
            self._scheduler.restart()
            done.set_result(None)
        self._moved_s = time.monotonic()

    def _step(self) -> None:
        try:
            self._stepper.step(self.executor)
        except OutOfMemory as error:
            if hasattr(self.executor, "lost"):  # other ranks may be in the middle of the step
                raise
            for sequence in tuple(self._scheduler.running):
                self._stepper.end(self._replies[sequence.number], "error", error)
            self._scheduler.restart()
        self._moved_s = time.monotonic()

    def _die(self, error: BaseException) -> None:
        """A step failed: what is in the KV cache is unknown, so nothing can go on."""
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        death = f"the engine was stopped by an error in a step ({what}); open the model again"
        with self._lock:
            self._death = death
            failed = [*self._replies.values(), *self._inbox]
            calls, self._calls = self._calls, []
            self._replies.clear()
            self._inbox.clear()
            self._lock.notify_all()
        for reply in failed:
            self._stepper.tell_end(reply, "error", EngineStopped(death))
        for _, done in calls:
            done.set_exception(EngineStopped(death))
        if self.on_death is not None:
            self.on_death(error)

    def leave_behind(self) -> None:
        """In the child of a fork: neither the thread is here, nor who may hold the lock."""
        # Sinks are not told, as what they write to may be the parent's too.
        self._lock = threading.Condition()
        self._thread, self._death = None, FORKED
        self._replies.clear()
        self._inbox, self._calls = [], []


def _scheduler(executor: Executor, config: EngineConfig) -> Scheduler:
    most = min(executor.max_rows, executor.max_outputs)
    if config.max_seqs > most:
        raise InvalidRequest(f"max_seqs is {config.max_seqs}; a step has room for {most}")
    contexts = 0 if config.no_kv_cache else config.prefix_cache_n
    blocks_each = -(-executor.context // executor.block_size)
    cache = PrefixCache(executor.blocks, executor.block_size, limit=contexts * blocks_each)
    limits = Limits(
        config.max_seqs, executor.max_rows, executor.max_outputs,
        prompt_rows=config.prompt_batchsize or executor.max_rows, recompute=config.no_kv_cache,
    )  # fmt: skip
    return Scheduler(cache, limits)


def _sequence(request: Request, number: int, dropped: int, settles: int | None) -> Sequence:
    """The tokens of the prompt behind those that are dropped."""
    ids = list(request.ids[dropped:])
    # The first token whose logits are wanted.
    scored = len(ids) - 1 if request.scoring is None else min(request.scoring.start, len(ids) - 1)
    spans = (span for span in request.spans if span.start >= dropped)
    moved = (replace(span, start=span.start - dropped, stop=span.stop - dropped) for span in spans)
    # A prefix that others may reuse ends where it depends on the end of this prompt.
    last = () if settles is None else (len(ids) + settles - 1,)
    settled = (Span(at, at + 1, b"settled") for at in last)
    rotary = request.rotary
    if rotary is not None:  # as if nothing had been before
        rotary = rotary[:, dropped:] - rotary[0, dropped]
    return Sequence(request, number, ids, scored, (*moved, *settled), rotary)


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A thread that is inside a native step while the interpreter goes away would abort it.
    for engine in list(_ENGINES):
        engine.close()


after_fork(lambda: deque(map(Engine.leave_behind, _ENGINES)))
