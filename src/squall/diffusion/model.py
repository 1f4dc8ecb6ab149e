"""A model that makes pictures, open and ready: one thread paints them, in order."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squall.closing import Closing
from squall.diffusion.request import Picture, PictureRequest
from squall.errors import EngineStopped, InvalidRequest, QueueFull
from squall.executors import ThreadPool
from squall.opening import Opening, one_by_one
from squall.quant import FormatTotal

if TYPE_CHECKING:
    from squall.diffusion.pipeline import FluxPipeline

OnStep = Callable[[int, int], None]
_SEEDS = 2**64


class _Cancelled(Exception):
    pass


@dataclass(eq=False, slots=True)
class Painting:
    """A picture that waits or is being made; any thread may ask.

    step, steps: how many are done, and how many there are.
    """

    request: PictureRequest
    steps: int
    on_progress: OnStep | None = None
    step: int = 0
    future: Future[Picture] = field(default_factory=Future)

    def cancel(self) -> bool:
        """End it, at the next step if it is being made; False if there was nothing to end."""
        return self.future.cancel()

    def result(self, timeout: float | None = None) -> Picture:
        """Wait for it. Raises what went wrong, CancelledError, or TimeoutError."""
        return self.future.result(timeout)


@dataclass(frozen=True, slots=True)
class PaintingStats:
    """A moment of a model that makes pictures.

    pictures: that were made. text_s, steps_s, decode_s: where time went, of the others too.
    stalled_s: since when there is something to do and no step has ended; 0 if there is nothing.
    """

    pictures: int = 0
    text_s: float = 0.0
    steps_s: float = 0.0
    decode_s: float = 0.0
    waiting: int = 0
    busy: bool = False
    stalled_s: float = 0.0


def _open(cls: type[ImageModel], opening: Opening) -> ImageModel:
    return cls.open_with(opening)


class ImageModel(Closing):
    """A model that makes pictures. Make one with `ImageModel.open`; any thread may call it.

    path: what was opened. max_queue: so many pictures may wait.
    """

    def __init__(self, pipeline: FluxPipeline, *, path: Path, max_queue: int = 16) -> None:
        self.path = path
        self.max_queue = max_queue
        self.steps, self.guidance = pipeline.steps, pipeline.guidance
        self.max_prompt = pipeline.max_prompt
        self._pipeline = pipeline
        self._process = os.getpid()
        # The lock guards what several threads touch: from here on.
        self._lock = threading.Condition()
        self._queue: deque[Painting] = deque()
        self._current: Painting | None = None
        self._thread: threading.Thread | None = None
        self._closed = self._draining = False
        self._stats = PaintingStats()
        self._moved_s = 0.0
        _MODELS.add(self)

    @classmethod
    def open_with(cls, opening: Opening, *, pool: ThreadPool | None = None) -> ImageModel:
        """Open what is described; `open` takes the options themselves.

        pool: threads to share with others; what other models do on it goes first.
        """
        from squall.diffusion.pipeline import open_pipeline

        pipeline, path = open_pipeline(opening, pool)
        return cls(pipeline, path=path)

    open = classmethod(one_by_one(Opening, _open))

    @property
    def formats(self) -> tuple[FormatTotal, ...]:
        """What the matrices are in memory: number formats, with counts and bytes."""
        return self._pipeline.formats

    @property
    def waiting(self) -> int:
        """Pictures that are to be made after the one that is being made."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        return self._current is not None

    def stats(self) -> PaintingStats:
        """A snapshot."""
        stalled_s = time.monotonic() - self._moved_s if self.busy else 0.0
        return replace(self._stats, waiting=self.waiting, busy=self.busy, stalled_s=stalled_s)

    def submit(self, request: PictureRequest, on_progress: OnStep | None = None) -> Painting:
        """Queue a picture. `on_progress` is told of each step, by the thread: it must not block.

        Raises InvalidRequest, QueueFull, EngineStopped, or OutOfMemory for what does not fit.
        """
        self._check_open()
        if request.guidance is not None and self.guidance is None:
            raise InvalidRequest("this model takes no guidance; leave it out")
        self._pipeline.check(request)
        if request.seed is None:
            request = replace(request, seed=secrets.randbelow(_SEEDS))
        painting = Painting(request, request.steps or self.steps, on_progress)
        painting.future.add_done_callback(lambda _: self._forget(painting))
        with self._lock:
            self._check_open()
            if (waiting := self.waiting) >= self.max_queue:
                seconds = math.ceil(self._picture_s() * (waiting + 1))
                raise QueueFull(
                    f"{waiting} pictures wait, and no more may; try again later",
                    retry_after_s=max(seconds, 1),
                )
            self._queue.append(painting)
            try:
                if self._thread is None:
                    self._moved_s = time.monotonic()
                    threading.Thread(target=self._run, name="squall-paint", daemon=True).start()
            except BaseException:  # no thread can be had, or it was interrupted
                painting.cancel()
                raise
        return painting

    def generate(
        self, prompt: str, *, n: int = 1, progress: OnStep | None = None, **fields: Any
    ) -> list[Picture]:
        """n pictures, with seeds one after another. fields: of `PictureRequest`.

        progress: called with steps done and steps in all, of all pictures together.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InvalidRequest(f"n is {n!r}; it must be a whole number, at least 1")
        request = PictureRequest(prompt=prompt, **fields)
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
        made: list[Picture] = []

        def told(step: int, steps: int) -> None:
            if progress is not None:
                progress(len(made) * steps + step, n * steps)

        for number in range(n):
            painting = self.submit(replace(request, seed=(seed + number) % _SEEDS), told)
            try:
                made.append(painting.result())
            finally:
                painting.cancel()  # if waiting was interrupted
        return made

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more pictures, and wait for those there are; whether all ended in time."""
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not (self._thread or self._queue), timeout_s)

    def close(self) -> None:
        """Cancel what is left, and free the model after the step it is in."""
        if self._process != os.getpid():
            return  # the thread is the parent's
        with self._lock:
            self._closed, already = True, self._closed
            left = [*self._queue, *([self._current] if self._current else [])]
            thread = self._thread
        for painting in left:
            painting.cancel()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if not already:
            self._pipeline.close()

    def _forget(self, painting: Painting) -> None:
        """It is done, or was cancelled while it waited."""
        with self._lock:
            if painting in self._queue:
                self._queue.remove(painting)
                # Who waits for several futures is told by this alone.
                painting.future.set_running_or_notify_cancel()

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise EngineStopped(
                "this process was forked after the model was opened; open it again here"
            )
        if self._closed:
            raise EngineStopped("the model is closed; open it again")
        if self._draining:
            raise EngineStopped("the model is shutting down and takes no more pictures")

    def _picture_s(self) -> float:
        at = self._stats
        return (at.text_s + at.steps_s + at.decode_s) / max(at.pictures, 1)

    # ---- the thread ----

    def _run(self) -> None:
        with self._lock:
            if self._thread is not None:
                return  # another was faster
            self._thread = threading.current_thread()
        while (painting := self._next()) is not None:
            future = painting.future
            try:
                picture = self._paint(painting)
            except _Cancelled:
                pass
            except BaseException as error:
                with contextlib.suppress(Exception):  # it was cancelled at this very moment
                    future.set_exception(error)
            else:
                self._stats = replace(self._stats, pictures=self._stats.pictures + 1)
                with contextlib.suppress(Exception):
                    future.set_result(picture)
            if future.cancelled():
                future.set_running_or_notify_cancel()

    def _next(self) -> Painting | None:
        with self._lock:
            to_do = self._queue and not self._closed
            self._current = self._queue.popleft() if to_do else None
            if self._current is None:
                self._thread = None
                self._lock.notify_all()
            return self._current

    def _paint(self, painting: Painting) -> Picture:
        """Make one, and tell of it, and keep the time: of the text, of steps, and after them."""
        self._moved_s = time.monotonic()
        done = -1

        def on_step(step: int, steps: int) -> None:
            nonlocal done
            if painting.future.cancelled():
                raise _Cancelled
            self._spend("text_s" if done < 0 else "decode_s" if done == steps else "steps_s")
            painting.step, painting.steps = max(step, 0), steps
            if step > done and painting.on_progress is not None:
                painting.on_progress(step, steps)
            done = max(done, step)

        if painting.future.cancelled():
            raise _Cancelled
        picture = self._pipeline.paint(painting.request, on_step)
        self._spend("decode_s")
        return picture

    def _spend(self, phase: str) -> None:
        now = time.monotonic()
        spent = getattr(self._stats, phase) + now - self._moved_s
        self._stats = replace(self._stats, **{phase: spent})
        self._moved_s = now


_MODELS: weakref.WeakSet[ImageModel] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A thread that is inside a native step while the interpreter goes away would abort it.
    for model in list(_MODELS):
        model.close()
