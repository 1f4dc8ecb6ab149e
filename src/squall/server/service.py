"""What the parts of a server share: the model, its limits, and whether it is well."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from squall.errors import QueueFull
from squall.model import Model
from squall.server.errors import ApiError, stopped
from squall.server.limits import Bodies
from squall.server.log import Log
from squall.server.metrics import Metrics
from squall.server.options import ServerOptions

# Requests are parsed, rendered and tokenized by so many threads; more would only fight for the GIL.
WORKERS = 2
# How many more than run and wait may be on their way into the queue or out of it.
SLACK = 32

LOGGER = logging.getLogger("squall.server")

_Value = TypeVar("_Value")


class Service:
    """One model being served.

    active: requests under way. entering: those for text that the engine does not know yet.
    draining: what is there ends, and nothing new is taken.
    dead: nothing will be answered any more, for the reason `why_dead`. failed: that was an error.
    """

    def __init__(self, model: Model, options: ServerOptions) -> None:
        self.model = model
        self.options = options
        self.model_id = options.model_id or model.checkpoint.path.stem
        self.created = int(time.time())
        self.defaults = {
            "model": self.model_id,
            "truncate_sequence": options.truncate,
            "seed": options.seed,
        }
        self.log = Log(options.log)
        self.metrics = Metrics(model.engine)
        self.bodies = Bodies(options)
        self.active = 0
        self.entering: set[object] = set()
        self.draining = False
        self.dead = asyncio.Event()
        self.why_dead: ApiError | None = None
        self.failed = False
        config = model.engine.config
        self._most_active = config.max_seqs + config.max_queue + SLACK
        self._workers = ThreadPoolExecutor(WORKERS, "squall-request")

    def check_ready(self) -> None:
        """Raises ApiError if nothing new can be answered."""
        if self.why_dead is not None:
            raise self.why_dead
        if self.draining:
            raise stopped("the server is shutting down; ask another one")

    def check_room(self) -> None:
        """Raises QueueFull, before anything of a request is read, if far too many are there."""
        if self.active > self._most_active:
            raise QueueFull(f"{self.active} requests are under way already", retry_after_s=1)

    def submit(self, function: Callable[[], _Value]) -> Future[_Value]:
        """Run what takes long beside the event loop."""
        return self._workers.submit(function)

    def die(self, reason: str, *, failed: bool = True) -> None:
        """Every request there is ends with an error."""
        self.why_dead = self.why_dead or stopped(reason)
        self.failed = self.failed or failed
        self.dead.set()

    async def run(self) -> None:
        """Watch the engine, until it is dead."""
        engine, loop = self.model.engine, asyncio.get_running_loop()

        def on_death(error: BaseException) -> None:
            LOGGER.error("a step failed", exc_info=error)
            loop.call_soon_threadsafe(self.die, "the engine was stopped by an error in a step")

        engine.on_death = on_death
        while not self.dead.is_set():
            await asyncio.sleep(min(1.0, self.options.stall_s / 4))
            stalled_s = engine.stats().stalled_s
            if stalled_s > self.options.stall_s:
                self.die(f"the engine has not moved for {stalled_s:.0f} s")

    def close(self) -> None:
        """End the threads and the log; the model stays open."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.log.close()
