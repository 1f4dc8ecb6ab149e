"""Where the time of runs goes, op by op."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from squall import program as p
from squall.batch import Sequences
from squall.executors import Phase
from squall.gpu.inputs import Given
from squall.gpu.matrices import Matrices

_Stamp = torch.cuda.Event | float


class Profile:
    """Times of ops: by events on CUDA, where nothing waits until a run is done; else by clock.

    The bytes and multiply-accumulates of experts are those of as many as rows can have chosen.
    """

    def __init__(self, weights: Matrices, device: torch.device, kv_bytes: int) -> None:
        self._weights, self._cuda, self._kv_bytes = weights, device.type == "cuda", kv_bytes
        self._noted: dict[int, list[tuple[_Stamp, _Stamp, tuple[int, int]]]] = {}
        self._ops: dict[int, p.Op] = {}
        self._run: tuple[Given, Sequences] | None = None

    def begin(self, given: Given, at: Sequences) -> None:
        """A run of these inputs."""
        self._run = given, at

    def act(self, number: int, op: p.Op, act: Callable[[], Tensor]) -> Tensor:
        """The op's result; its time is noted."""
        before, out, after = self._stamp(), act(), self._stamp()
        self._ops[number] = op
        self._noted.setdefault(number, []).append((before, after, self._work(op, len(out))))
        return out

    def phases(self) -> list[Phase]:
        """In the program's order; runs are done, on the device too."""
        found = []
        for number, noted in sorted(self._noted.items()):
            op = self._ops[number]
            shapes = [
                f" {self._weights.matrix(m).format} {m.rows}x{m.cols}" for m in p.matrices(op)
            ]
            name = p.name_of(op).replace("_", " ")
            elapsed_s = sum(_seconds(before, after) for before, after, _ in noted)
            nbytes, fmas = (sum(work[i] for _, _, work in noted) for i in (0, 1))
            found.append(Phase(name + "".join(shapes[-1:]), elapsed_s, 0.0, nbytes, 0, fmas))
        return found

    def _stamp(self) -> _Stamp:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _work(self, op: p.Op, rows: int) -> tuple[int, int]:
        """Bytes that must be read, and multiply-accumulates."""
        if isinstance(op, p.Attend):
            return self._attention(op)
        nbytes = fmas = 0
        for matrix in p.matrices(op):
            top_k = getattr(op, "top_k", 1) if matrix.experts > 1 else 1
            whole = self._weights.matrix(matrix).nbytes
            if isinstance(op, p.Embed):
                nbytes += whole // matrix.rows * rows
                continue
            nbytes += whole * min(matrix.experts, rows * top_k) // matrix.experts
            fmas += rows * top_k * matrix.rows * matrix.cols
        return nbytes, fmas

    def _attention(self, op: p.Attend) -> tuple[int, int]:
        """Keys and values that the last row of each sequence sees, and all that rows see."""
        assert self._run is not None
        given, at = self._run
        first, last = given.indices[op.spans.name].astype(np.int64)
        cached = op.cache is not None
        own = at.positions if cached else np.arange(len(first), dtype=np.int32)
        ends = np.unique(at.bounds[1:]) - 1 if cached else np.array([len(first) - 1])
        if op.window is not None:
            first = np.maximum(first, own + 1 - op.window)
        seen = np.maximum(last - first, 0)
        read = int(seen[ends[ends >= 0]].sum())
        width = op.head_dim * 2
        return read * op.kv_heads * width * self._kv_bytes, int(seen.sum()) * op.heads * width


def _seconds(start: _Stamp, stop: _Stamp) -> float:
    if isinstance(start, float) or isinstance(stop, float):
        return float(stop) - float(start)  # type: ignore[arg-type]
    return float(start.elapsed_time(stop)) / 1e3
