"""Where the time of runs goes, op by op."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from squall import program as p
from squall.batch import Sequences
from squall.executors import Phase
from squall.gpu.inputs import Given
from squall.gpu.matrices import Matrices

_NAMES: Mapping[type, str] = {
    p.Embed: "embed", p.RopeAngles: "rope angles", p.Normalize: "norm", p.Linear: "linear",
    p.GatedLinear: "gated linear", p.Rotate: "rotate", p.Attend: "attend", p.Recall: "recall",
    p.MixtureOfExperts: "moe", p.Add: "add", p.Concatenate: "concatenate", p.Softcap: "softcap",
    p.GatherRows: "gather rows", p.Overlay: "overlay", p.GatherColumns: "gather columns",
}  # fmt: skip


class Profile:
    """Times of ops: by events on CUDA, where nothing waits until a run is done; else by clock.

    The bytes and multiply-accumulates of experts are those of as many as rows can have chosen.
    """

    def __init__(self, weights: Matrices, device: torch.device, kv_bytes: int) -> None:
        self._weights, self._cuda, self._kv_bytes = weights, device.type == "cuda", kv_bytes
        self._phases: dict[int, Phase] = {}
        self._pending: list[tuple[int, p.Op, Callable[[], float], tuple[int, int]]] = []
        self._run: tuple[Given, Sequences] | None = None

    def begin(self, given: Given, at: Sequences) -> None:
        """A run of these inputs."""
        self._run = given, at

    def act(self, number: int, op: p.Op, act: Callable[[], Tensor]) -> Tensor:
        """The op's result; its time is noted."""
        stamp = self._stamp()
        out = act()
        after = self._stamp()
        work = self._work(op, len(out))
        self._pending.append((number, op, lambda: _seconds(stamp, after), work))
        return out

    def end(self) -> None:
        """The run is done, on the device too."""
        for number, op, elapsed_s, (nbytes, fmas) in self._pending:
            old = self._phases.get(number, Phase(self._name(op), 0.0, 0.0, 0, 0, 0))
            self._phases[number] = Phase(
                old.name, old.elapsed_s + elapsed_s(), 0.0, old.bytes + nbytes, 0, old.fmas + fmas
            )
        self._pending.clear()

    def phases(self) -> list[Phase]:
        """In the program's order."""
        return [self._phases[number] for number in sorted(self._phases)]

    def _stamp(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _name(self, op: p.Op) -> str:
        shapes = [f" {self._weights.matrix(m).format} {m.rows}x{m.cols}" for m in p.matrices(op)]
        return _NAMES.get(type(op), type(op).__name__) + "".join(shapes[-1:])

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


def _seconds(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> float:
    if isinstance(start, float) or isinstance(stop, float):
        return float(stop) - float(start)  # type: ignore[arg-type]
    return float(start.elapsed_time(stop)) / 1e3
