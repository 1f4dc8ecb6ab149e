"""The engine: one thread that runs steps for all requests there are."""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from squall.batch import Batch
from squall.engine.answer import Answer, Sink, Stream
from squall.engine.prefix_cache import PrefixCache
from squall.engine.request import FinishReason, Logits, Progress, Request
from squall.engine.sampling import sample_rows
from squall.engine.scheduler import Chunk, Limits, Scheduler
from squall.errors import ContextLengthExceeded, EngineStopped, InvalidRequest, QueueFull
from squall.executors import Executor

# The thread ends when there was nothing to do for so long; the next request starts another.
IDLE_S = 1.0
# What truncation leaves for an answer of no stated length.
ANSWER_ROOM = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How many requests, and what is kept.

    max_seqs: requests that run at a time. max_queue: how many more may wait, and max_queue_tokens
        the prompt tokens of those; what comes then is refused. queue_timeout_s: and so is what has
        waited so long without having begun.
    prompt_batchsize: at most so many tokens of prompts a step.
    prefix_cache_n: keep prefixes of finished requests, as much as so many whole contexts; 0: none.
    no_kv_cache: compute every token anew in every step.
    """

    max_seqs: int = 16
    max_queue: int = 256
    max_queue_tokens: int = 2**20
    queue_timeout_s: float | None = None
    prompt_batchsize: int | None = None
    prefix_cache_n: int = 16
    no_kv_cache: bool = False

    def __post_init__(self) -> None:
        least = {"max_seqs": 1, "max_queue": 0, "max_queue_tokens": 0, "prompt_batchsize": 1}
        for name, allowed in (least | {"prefix_cache_n": 0, "queue_timeout_s": 0}).items():
            value = getattr(self, name)
            if value is not None and value < allowed:
                raise InvalidRequest(f"{name} is {value}; it must be at least {allowed}")


@dataclass(slots=True)
class Counts:
    """What the engine did so far.

    prompt_tokens were computed, some perhaps again; cached_tokens did not have to be. Seconds in
    `executor_s` and `sampling_s` are part of those in `step_s`.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    errors: int = 0
    steps: int = 0
    step_s: float = 0.0
    executor_s: float = 0.0
    sampling_s: float = 0.0
    last_step_s: float = 0.0
    longest_step_s: float = 0.0


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


class _Silent:
    """The text of requests that nobody wants to read."""

    stopped = False

    def push(self, token: int, /) -> str:  # noqa: ARG002
        return ""

    def finish(self) -> str:
        return ""


def _silent(request: Request) -> Stream:  # noqa: ARG001
    return _Silent()


class Engine:
    """Answers many requests at a time. Any thread may call it.

    text: makes what turns the tokens of a request into text. stop_ids: the model's end tokens.
    on_death: called on the engine's thread when an error in a step has ended it.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig | None = None,
        *,
        text: Callable[[Request], Stream] = _silent,
        stop_ids: frozenset[int] = frozenset(),
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.executor = executor
        self.on_death = on_death
        self.capacity = min(executor.context, executor.blocks * executor.block_size)
        self._text = text
        self._stop_ids = stop_ids
        self._scheduler = _scheduler(executor, config)
        # The lock guards what other threads touch: from here to `_death`.
        self._lock = threading.Condition()
        self._inbox: list[Answer] = []
        self._cancels: set[Answer] = set()
        self._clear = False
        self._calls: list[tuple[Callable[[], None], Future[None]]] = []
        self._draining = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self._death: BaseException | None = None
        self._answers: dict[int, Answer] = {}
        self._numbers = count()
        self._counts = Counts()
        self._moved_s = time.monotonic()
        self._service_s = 1.0
        _ENGINES.add(self)

    # ---- from any thread ----

    def submit(self, request: Request, sink: Sink) -> Answer:
        """Queue a request. `sink` gets its pieces, on the engine's thread: it must not block.

        Raises ContextLengthExceeded for a prompt that never fits, QueueFull, and EngineStopped.
        A sink that raises ends its request.
        """
        ids = self._fit(request)
        room = self.capacity - len(ids)
        answer = Answer(
            request,
            Progress(request, next(self._numbers), ids, _first_wanted(request, ids)),
            self._text(request),
            sink,
            max_tokens=room if request.max_tokens is None else min(request.max_tokens, room),
            stop_ids=request.stop_ids | (frozenset() if request.ignore_eos else self._stop_ids),
            on_cancel=self._cancel,
        )
        with self._lock:
            self._check_open()
            self.check_room(len(ids))
            self._inbox.append(answer)
            self._wake()
        return answer

    @property
    def alive(self) -> bool:
        """Whether no step has failed so far."""
        return self._death is None

    def stats(self) -> Stats:
        """A snapshot; its numbers may be of neighbouring moments."""
        pool, scheduler = self._scheduler.cache.pool, self._scheduler
        busy = self._answers or self._inbox
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            blocks=pool.size,
            blocks_used=pool.size - pool.available,
            blocks_cached=pool.kept,
            preemptions=scheduler.preemptions,
            stalled_s=time.monotonic() - self._moved_s if busy else 0.0,
            counts=replace(self._counts),
        )

    def check_room(self, tokens: int = 0, *, others: int = 0) -> None:
        """Raises QueueFull if a prompt of `tokens` would have no place to run or to wait.

        others: requests that are not here yet. A queue of one request may have any size.
        """
        scheduler, config = self._scheduler, self.config
        with self._lock:
            ahead = len(self._answers) + len(self._inbox) - len(self._cancels) + others
            inbox_tokens = sum(len(answer.progress.tokens) for answer in self._inbox)
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
        return max(1, math.ceil((ahead + 1 - most) / most * self._service_s))

    def clear_cache(self) -> None:
        """Forget all prefixes before the next step."""
        with self._lock:
            self._clear = True

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
            return self._lock.wait_for(lambda: not (self._inbox or self._answers), timeout_s)

    def close(self) -> None:
        """Cancel what is left and end the thread, after the step it is in."""
        with self._lock:
            self._draining = self._closing = True
            thread = self._thread
            self._lock.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _fit(self, request: Request) -> list[int]:
        """The prompt, or as much of its end as fits."""
        ids, answer = list(request.ids), int(request.max_tokens != 0)
        if len(ids) + answer <= self.capacity:
            return ids
        if request.truncate:
            wanted = request.max_tokens or ANSWER_ROOM
            room = wanted if wanted < self.capacity else ANSWER_ROOM
            return ids[-max(self.capacity - room, 1) :]
        raise ContextLengthExceeded(
            f"{len(ids)} tokens{' and an answer' * answer} do not fit the context of "
            f"{self.capacity} tokens; shorten them, or open the model with a longer context"
        )

    def _check_open(self) -> None:
        if self._death is not None:
            raise EngineStopped(_stopped_by(self._death))
        if self._draining:
            raise EngineStopped("the engine is shutting down and takes no more requests")

    def _cancel(self, answer: Answer) -> None:
        with self._lock:
            self._cancels.add(answer)
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
            while not (self._answers or self._left_here() or self._closing):
                self._lock.notify_all()
                if not self._lock.wait(IDLE_S) and not self._left_here():
                    self._thread = None
                    return False
                self._moved_s = time.monotonic()
            for answer in self._inbox:
                self._answers[answer.progress.number] = answer
                self._scheduler.add(answer.progress)
            cancels = set(self._answers.values()) if self._closing else self._cancels
            self._inbox, self._cancels = [], set()
            clear, self._clear = self._clear, False
            calls, self._calls = self._calls, []
        for change, done in calls:
            self._change(change, done)
        if clear:
            self._scheduler.cache.clear()
        for answer in cancels:
            if answer.progress.number in self._answers:
                self._end(answer, "cancelled")
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
        for progress in tuple(self._scheduler.waiting):
            answer = self._answers[progress.number]
            if answer.waited_s() > allowed_s:
                message = f"no place became free within {allowed_s:g} s; try again later"
                retry_after_s = self._retry_after_s(len(self._answers))
                self._end(answer, "error", QueueFull(message, retry_after_s=retry_after_s))

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
        """Compute a chunk of each running request, and give those that are due a token."""
        started_s = time.perf_counter()
        chunks = self._scheduler.plan()
        if not chunks:
            return
        for chunk in chunks:
            self._counts.cached_tokens += self._answers[chunk.of.number].start(chunk)
        batch = _batch(chunks)
        called_s = time.perf_counter()
        logits = self.executor.step(batch)
        executor_s = time.perf_counter() - called_s
        self._scheduler.pace.observe(len(batch.tokens), executor_s)
        due, at = [], 0
        for chunk in chunks:
            rows = logits[at : at + len(chunk.outputs)]
            at += len(chunk.outputs)
            if self._advance(chunk, rows):
                due.append((self._answers[chunk.of.number], at - 1))
        self._sample(logits, due)
        self._count(started_s, executor_s)

    def _advance(self, chunk: Chunk, rows: Logits) -> bool:
        """The chunk was computed, with these logits; whether its request gets a token now."""
        answer = self._answers[chunk.of.number]
        done = self._scheduler.advance(chunk)
        self._counts.prompt_tokens += max(
            min(chunk.stop, answer.usage.prompt_tokens) - chunk.start, 0
        )
        try:
            answer.tell_logits(chunk, rows)
        except Exception as error:
            self._end(answer, "error", error)
            return False
        if done and not answer.max_tokens:
            self._end(answer, "length")
            return False
        return done

    def _sample(self, logits: Logits, due: Sequence[tuple[Answer, int]]) -> None:
        """Give each request the token drawn from its row of the logits."""
        if not due:
            return
        rows = [row for _, row in due]
        if len(rows) < len(logits):
            logits = logits[rows]
        called_s = time.perf_counter()
        found = sample_rows(logits, [answer.row() for answer, _ in due], pool=self.executor.pool)
        self._counts.sampling_s += time.perf_counter() - called_s
        for (answer, _), sampled in zip(due, found, strict=True):
            try:
                if isinstance(sampled, Exception):
                    raise sampled
                reason = answer.push(sampled)
                self._counts.answer_tokens += 1
                if reason is None:
                    answer.tell()
                    continue
            except Exception as error:
                self._end(answer, "error", error)
            else:
                self._end(answer, reason)

    def _end(self, answer: Answer, reason: FinishReason, error: Exception | None = None) -> None:
        """The request leaves; its blocks are free at once."""
        self._scheduler.remove(answer.progress)
        del self._answers[answer.progress.number]
        self._tell_end(answer, reason, error)
        if reason in ("stop", "length"):
            self._service_s += (answer.usage.running_s - self._service_s) / 8

    def _tell_end(
        self, answer: Answer, reason: FinishReason, error: Exception | None = None
    ) -> None:
        name = {"cancelled": "cancelled", "error": "errors"}.get(reason, "finished")
        setattr(self._counts, name, getattr(self._counts, name) + 1)
        # Who does not want to hear the end cannot be told of it.
        with suppress(Exception):
            answer.tell(reason, error)

    def _count(self, started_s: float, executor_s: float) -> None:
        counts, step_s = self._counts, time.perf_counter() - started_s
        counts.steps += 1
        counts.step_s += step_s
        counts.executor_s += executor_s
        counts.last_step_s = step_s
        counts.longest_step_s = max(counts.longest_step_s, step_s)
        self._moved_s = time.monotonic()

    def _die(self, error: BaseException) -> None:
        """A step failed: what is in the KV cache is unknown, so nothing can go on."""
        with self._lock:
            self._death = error
            failed = [*self._answers.values(), *self._inbox]
            calls, self._calls = self._calls, []
            self._answers.clear()
            self._inbox.clear()
            self._lock.notify_all()
        for answer in failed:
            self._tell_end(answer, "error", EngineStopped(_stopped_by(error)))
        for _, done in calls:
            done.set_exception(EngineStopped(_stopped_by(error)))
        if self.on_death is not None:
            self.on_death(error)


def _scheduler(executor: Executor, config: EngineConfig) -> Scheduler:
    most = min(executor.max_rows, executor.max_outputs)
    if config.max_seqs > most:
        raise InvalidRequest(f"max_seqs is {config.max_seqs}; a step has room for {most}")
    contexts = 0 if config.no_kv_cache else config.prefix_cache_n
    blocks_each = -(-executor.context // executor.block_size)
    cache = PrefixCache(executor.blocks, executor.block_size, limit=contexts * blocks_each)
    rows = max(
        min(executor.max_rows, config.prompt_batchsize or executor.max_rows), config.max_seqs
    )
    limits = Limits(config.max_seqs, rows, executor.max_outputs, recompute=config.no_kv_cache)
    return Scheduler(cache, limits)


def _first_wanted(request: Request, ids: Sequence[int]) -> int:
    """The first token whose logits are wanted."""
    return len(ids) - 1 if request.scoring is None else min(request.scoring.start, len(ids) - 1)


def _batch(chunks: Sequence[Chunk]) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    bounds, outputs = [0], []
    width = max(len(chunk.of.blocks) for chunk in chunks)
    tables = np.zeros((len(chunks), width), np.int32)
    for i, chunk in enumerate(chunks):
        blocks, span = chunk.of.blocks, range(chunk.start, chunk.stop)
        outputs += [len(tokens) + output - chunk.start for output in chunk.outputs]
        tokens += chunk.of.tokens[chunk.start : chunk.stop]
        positions += span
        bounds.append(len(tokens))
        tables[i, : len(blocks)] = blocks
    return Batch(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        bounds=np.array(bounds, np.int32),
        block_tables=tables,
        outputs=np.array(outputs, np.int32),
    )


def _stopped_by(error: BaseException) -> str:
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"the engine was stopped by an error in a step ({what}); open the model again"


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A thread that is inside a native step while the interpreter goes away would abort it.
    for engine in list(_ENGINES):
        engine.close()
