"""Steps of few rows as CUDA graphs: one launch in place of hundreds.

A graph is a step of one shape: rows padded to a power of two, and what attention calls its `Shape`.
It reads its inputs from a buffer of its own, and leaves its outputs where they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MOST_ROWS = 64
_MOST, _MOST_SEEN = 48, 1024

_log = logging.getLogger(__name__)

Outputs = dict[str, Tensor]
Body = Callable[[Tensor], Outputs]
"""What a step does with its inputs on the device."""


class Recorder(Protocol):
    """Runs something so that it can be run again on the same tensors."""

    def record(self, act: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        """What repeats it, and where the outputs then are."""
        ...


class CudaRecorder:
    """CUDA's graphs on one device; all have their memory from one pool, as one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, act: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        """See `Recorder`."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            act()  # so that nothing is set up, compiled or tuned while capturing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            outputs = act()
        current.wait_stream(self._stream)
        return graph.replay, outputs


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: Tensor
    replay: Callable[[], object]
    outputs: Outputs


def padded_rows(rows: int) -> int:
    """The power of two that so many rows are padded to."""
    return 1 << max(rows - 1, 0).bit_length()


class Graphs:
    """The graphs of an executor, by shape: made when a shape comes for the second time."""

    def __init__(self, recorder: Recorder, most: int = _MOST) -> None:
        self._recorder, self._most = recorder, most
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}
        self._failed = False

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, staged: Tensor, device: torch.device, body: Body) -> Outputs:
        """The outputs of the body, from a graph if there is one; valid until the next run.

        key: equal where the same work is done on tensors of the same shapes.
        """
        if (graph := self._graphs.pop(key, None)) is not None:
            self._graphs[key] = graph  # the last one used is the last to go
            graph.inputs.copy_(staged, non_blocking=True)
            graph.replay()
            return graph.outputs
        inputs = torch.empty_like(staged, device=device, pin_memory=False)
        inputs.copy_(staged, non_blocking=True)
        if key not in self._seen or self._failed:
            self._seen = self._seen | {key} if len(self._seen) < _MOST_SEEN else {key}
            return body(inputs)
        return self._record(key, inputs, body)

    def _record(self, key: Hashable, inputs: Tensor, body: Body) -> Outputs:
        while len(self._graphs) >= self._most:
            self._graphs.pop(next(iter(self._graphs)))
        try:
            replay, outputs = self._recorder.record(lambda: body(inputs))
        except RuntimeError as error:
            self._failed = True
            _log.warning("steps are not CUDA graphs, since one cannot be made: %s", error)
            return body(inputs)
        self._graphs[key] = graph = _Graph(inputs, replay, outputs)
        graph.replay()
        return outputs
