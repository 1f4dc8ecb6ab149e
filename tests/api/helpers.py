"""What the tests of the API share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def wait_for(true: Callable[[], bool]) -> None:
    """Until the engine's thread has done what it was told."""
    deadline_s = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def forced(ids: Sequence[int]) -> Callable[..., None]:
    """A logits processor that makes the answer these tokens, whatever the model would say."""
    start: list[int] = []

    def force(logits: NDArray[np.float32], seen: NDArray[np.int32]) -> None:
        start[:] = start or [len(seen)]
        wanted = ids[len(seen) - start[0]]
        logits[:] = -np.inf
        logits[wanted] = 0

    return force
