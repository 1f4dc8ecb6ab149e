"""The executor of PyTorch's devices."""

from __future__ import annotations

from collections.abc import Sequence

from squall.executors import Executor, Limits, Placement, ThreadPool
from squall.program import Program
from squall.weights import Progress, WeightStore


def TorchExecutor(  # noqa: PLR0913
    program: Program,
    store: WeightStore,
    limits: Limits,
    *,
    placement: Placement,
    pool: ThreadPool | None = None,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> Executor:
    """See `executors.open`."""
    raise NotImplementedError
