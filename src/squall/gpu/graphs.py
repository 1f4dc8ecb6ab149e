"""Steps of few rows as CUDA graphs: one launch in place of hundreds.

A graph is a step of one shape: rows padded to a power of two, and what attention calls its `Shape`.
It reads its inputs from a buffer of its own, and leaves its outputs where they were.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROWS = 64
_MOST = 64  # shapes
_CAPTURING = threading.Lock()

_log = logging.getLogger(__name__)

Outputs = dict[str, Tensor]
Body = Callable[[Tensor], Outputs]
"""What a step does with its inputs on the device."""


Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], object], Outputs]]
"""Runs something so that it can be repeated: by what, and where its outputs then are."""


def cuda_recorder(device: torch.device) -> Record:
    """CUDA's graphs on one device; all have their memory from one pool, as one runs at a time."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(act: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        # What begins a capture waits for the device, which fails while another is captured.
        with _CAPTURING, torch.cuda.stream(stream):  # left so, even if the capture fails
            act()  # so that nothing is set up, compiled or tuned while capturing
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                outputs = act()
        current.wait_stream(stream)
        return graph.replay, outputs

    return record


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: Tensor
    replay: Callable[[], object]
    outputs: Outputs


def padded_rows(rows: int) -> int:
    """The power of two that so many rows are padded to."""
    return 1 << (rows - 1).bit_length() if rows else 0


class Graphs:
    """The graphs of an executor, by shape: made when a shape comes for the second time."""

    def __init__(self, record: Record, most: int = _MOST) -> None:
        self._record, self._most = record, most
        self._graphs: dict[Hashable, _Graph | None] = {}
        self._failed = False

    def run(self, key: Hashable, staged: Tensor, device: torch.device, body: Body) -> Outputs:
        """The outputs of the body, from a graph if there is one; valid until the next run.

        key: equal where the same work is done on tensors of the same shapes.
        """
        again, graph = key in self._graphs, self._graphs.pop(key, None)
        inputs = torch.empty_like(staged, device=device) if graph is None else graph.inputs
        inputs.copy_(staged, non_blocking=True)
        if graph is None and again and not self._failed:
            graph = self._recorded(inputs, body)
        while len(self._graphs) >= self._most:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[key] = graph  # the last one used is the last to go
        if graph is None:
            return body(inputs)
        graph.replay()
        return graph.outputs

    def _recorded(self, inputs: Tensor, body: Body) -> _Graph | None:
        try:
            return _Graph(inputs, *self._record(lambda: body(inputs)))
        except RuntimeError as error:
            self._failed = True
            _log.warning("steps are not CUDA graphs, since one cannot be made: %s", error)
            return None
