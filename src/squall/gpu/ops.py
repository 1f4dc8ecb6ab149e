"""What ops are on PyTorch's devices: each is lowered once, to a function of a run.

A row's bytes depend on no other row. Of PyTorch's functions only those are used that treat all
places of a tensor alike; on the CPU sigmoid, silu, and sums of very wide rows do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from squall import program as p
from squall.executors.parallel import Ranks
from squall.gpu import attention, linear, matrices, rows
from squall.gpu.adapters import Added, TorchMixture
from squall.gpu.inputs import Segment
from squall.gpu.mixture import Experts, route


class Recalled(Protocol):
    """What a sequence recalls; at: keys and values of each of the program's memories."""

    @property
    def at(self) -> Sequence[tuple[Tensor, Tensor]]: ...


@dataclass(slots=True)
class Run:
    """One run. values: of inputs and ops, by id. groups: of rows that share, by index."""

    values: dict[int, Tensor]
    indices: Mapping[str, Tensor]
    rows: attention.Rows | None = None
    memories: Sequence[Recalled | None] = ()
    mixtures: Sequence[TorchMixture] = ()
    segments: Mapping[str, list[Segment]] = field(default_factory=dict)
    groups: Mapping[str, list[Tensor]] = field(default_factory=dict)

    def __getitem__(self, value: p.Value) -> Tensor:
        return self.values[value.id]

    def index(self, index: p.Index) -> Tensor:
        """[rows], or [axes, rows]."""
        return self.indices[index.name]


Act = Callable[[Run], Tensor]


@dataclass(frozen=True, slots=True)
class Lowering:
    """What ops become functions of.

    wide: the values that are float32 whatever `dtype` is. ranks: those that run parts of the model.
    """

    weights: matrices.Matrices
    caches: Sequence[attention.Cache]
    device: torch.device
    dtype: torch.dtype
    exact: bool
    wide: frozenset[p.Value]
    ranks: Ranks | None = None

    def type_of(self, value: p.Value) -> torch.dtype:
        return torch.float32 if value in self.wide else self.dtype

    def tensor(self, values: Sequence[float] | np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)


def wide_values(program: p.Program) -> frozenset[p.Value]:
    """Angles, scalings of adapters, and what only leaves the program."""
    wide: set[p.Value] = set()
    read = {value for op in program.ops for value in p.reads(op)}
    wide.update(value for value in program.outputs if value not in read)
    for op in reversed(program.ops):
        adapters = getattr(op, "adapters", None)
        if isinstance(op, p.Rotate):
            wide.add(op.angles)
        elif isinstance(op, p.Softcap) and op.out in wide:
            wide.add(op.x)
        elif adapters is not None and adapters.scalings is not None:
            wide.add(adapters.scalings)
    return frozenset(wide)


@functools.singledispatch
def lower(op: p.Op, to: Lowering) -> Act:  # noqa: ARG001
    """The op as a function of a run."""
    raise AssertionError(f"no lowering of {type(op).__name__}")


# ---- rows ----


@lower.register
def _(op: p.Normalize, to: Lowering) -> Act:
    weight, bias = to.weights.vector(op.weight), to.weights.vector(op.bias)
    assert weight is not None
    dtype = to.type_of(op.out)

    def act(run: Run) -> Tensor:
        return rows.normalize(run[op.x], weight, bias, op.kind, op.eps, op.group).to(dtype)

    return act


@lower.register
def _(op: p.RopeAngles, to: Lowering) -> Act:
    frequencies = to.tensor(op.frequencies, torch.float32)
    axes = to.tensor(op.axes or (0,) * len(op.frequencies), torch.int32)

    def act(run: Run) -> Tensor:
        positions = run.index(op.positions)
        positions = positions[:, None] if positions.ndim < 2 else positions.T
        angles = positions.index_select(1, axes).float() * frequencies
        return torch.cat((torch.cos(angles), torch.sin(angles)), 1) * op.magnitude

    return act


@lower.register
def _(op: p.Rotate, to: Lowering) -> Act:
    dtype = to.type_of(op.out)

    def act(run: Run) -> Tensor:
        x, angles = run[op.x], run[op.angles]
        return rows.rotate(x, angles, op.heads, op.head_dim, op.interleaved).to(dtype)

    return act


@lower.register
def _(op: p.Add, to: Lowering) -> Act:
    dtype = to.type_of(op.out)

    def act(run: Run) -> Tensor:
        a, b = run[op.a], run[op.b]
        return (a + b if op.scale == 1 else a + b.float() * op.scale).to(dtype)

    return act


@lower.register
def _(op: p.Softcap, to: Lowering) -> Act:
    dtype = to.type_of(op.out)
    return lambda run: (torch.tanh(run[op.x].float() / op.cap) * op.cap).to(dtype)


@lower.register
def _(op: p.Concatenate, to: Lowering) -> Act:
    dtype = to.type_of(op.out)
    return lambda run: torch.cat((run[op.a], run[op.b]), 1).to(dtype)


@lower.register
def _(op: p.GatherColumns, to: Lowering) -> Act:
    order = to.tensor(np.frombuffer(op.order, "<u4").astype(np.int32), torch.int32)
    dtype = to.type_of(op.out)
    return lambda run: run[op.x].index_select(1, order).to(dtype)


@lower.register
def _(op: p.GatherRows, to: Lowering) -> Act:
    dtype = to.type_of(op.out)

    def act(run: Run) -> Tensor:
        x, index = run[op.x], run.index(op.index)
        found = [x.index_select(0, own) for own in (index if index.ndim > 1 else index[None])]
        if not op.mean:
            return torch.cat(found, 1).to(dtype)
        mean = found[0].float()
        for other in found[1:]:
            mean = mean + other
        return (mean * (1 / len(found))).to(dtype)

    return act


@lower.register
def _(op: p.Overlay, to: Lowering) -> Act:
    dtype = to.type_of(op.out)

    def act(run: Run) -> Tensor:
        x, over, index = run[op.x].to(dtype), run[op.rows].to(dtype), run.index(op.index)
        if not len(over):
            return x
        return torch.where((index >= 0)[:, None], over.index_select(0, index.clamp(min=0)), x)

    return act


@lower.register
def _(op: p.AllReduce, to: Lowering) -> Act:
    ranks, dtype = to.ranks, to.type_of(op.out)
    assert ranks is not None
    return lambda run: ranks.sum(run[op.x], exact=to.exact).to(dtype)


# ---- attention ----


@lower.register
def _(op: p.Attend, to: Lowering) -> Act:
    exact, dtype = to.exact, to.type_of(op.out)
    if op.cache is None:
        return lambda run: attention.attend_here(
            op, run[op.q], run[op.k], run[op.v], run.index(op.spans), exact=exact
        ).to(dtype)
    cache = to.caches[op.cache]

    def act(run: Run) -> Tensor:
        assert run.rows is not None
        attention.store(cache, run[op.k], run[op.v], run.rows)
        spans = run.index(op.spans)
        return attention.attend(op, run[op.q], cache, spans, run.rows, exact=exact).to(dtype)

    return act


@lower.register
def _(op: p.Recall, to: Lowering) -> Act:
    exact, dtype = to.exact, to.type_of(op.out)

    def act(run: Run) -> Tensor:
        q, seen = run[op.q], run.index(op.seen)
        if not any(run.memories):
            return torch.zeros_like(q)
        assert run.rows is not None
        own = [None if memory is None else memory.at[op.memory] for memory in run.memories]
        return attention.recall(op, q, own, seen, run.rows, exact=exact).to(dtype)

    return act


# ---- products ----


def _changed(fused: Act, run: Run, changed: Tensor, segments: list[Segment]) -> Tensor:
    """Rows with adapters as `changed` has them; the others as if there were no adapters."""
    if sum(stop - start for start, stop, _ in segments) == len(changed):
        return changed
    out = fused(run)
    for start, stop, _ in segments:
        out[start:stop] = changed[start:stop]
    return out


@lower.register
def _(op: p.Embed, to: Lowering) -> Act:
    table, dtype, added = to.weights.matrix(op.table), to.type_of(op.out), Added.of(op, to.exact)

    def fused(run: Run) -> Tensor:
        return linear.embed(run.index(op.index), table, scale=op.scale, dtype=dtype)

    def act(run: Run) -> Tensor:
        if not (segments := added.segments(run)):
            return fused(run)
        ids = run.index(op.index)
        y = matrices.lookup(table, ids)
        added.add(run, y, ids, (op.table.role, 0))
        return _changed(fused, run, (y * op.scale).to(dtype), segments)

    return fused if op.adapters is None else act


@lower.register
def _(op: p.Linear, to: Lowering) -> Act:
    weight, bias = to.weights.matrix(op.weight), to.weights.vector(op.bias)
    exact, dtype, added = to.exact, to.type_of(op.out), Added.of(op, to.exact)

    def fused(run: Run) -> Tensor:
        residual = None if op.residual is None else run[op.residual]
        return linear.linear(
            run[op.x], weight, bias=bias, activation=op.activation, scale=op.scale,
            residual=residual, exact=exact, dtype=dtype,
        )  # fmt: skip

    def act(run: Run) -> Tensor:
        if not (segments := added.segments(run)):
            return fused(run)
        y = linear.linear(run[op.x], weight, exact=exact, dtype=torch.float32)
        added.add(run, y, run[op.x], (op.weight.role, 0))
        y = linear.activated(y if bias is None else y + bias, op.activation, exact=exact) * op.scale
        y = y if op.residual is None else run[op.residual] + y
        return _changed(fused, run, y.to(dtype), segments)

    return fused if op.adapters is None else act


@lower.register
def _(op: p.GatedLinear, to: Lowering) -> Act:
    parts = [
        (part, to.weights.matrix(part), to.weights.vector(bias))
        for part, bias in ((op.gate, op.gate_bias), (op.up, op.up_bias))
    ]
    (_, gate, gate_bias), (_, up, up_bias) = parts
    exact, dtype, added = to.exact, to.type_of(op.out), Added.of(op, to.exact)

    def fused(run: Run) -> Tensor:
        return linear.gated(
            run[op.x], gate, up, gate_bias=gate_bias, up_bias=up_bias,
            activation=op.activation, exact=exact,
        ).to(dtype)  # fmt: skip

    def act(run: Run) -> Tensor:
        if not (segments := added.segments(run)):
            return fused(run)
        x, sums = run[op.x], []
        for part, weight, bias in parts:
            y = linear.linear(x, weight, exact=exact, dtype=torch.float32)
            added.add(run, y, x, (part.role, 0))
            sums.append(y if bias is None else y + bias)
        y = linear.activated(sums[0], op.activation, exact=exact) * sums[1]
        return _changed(fused, run, y.to(dtype), segments)

    return fused if op.adapters is None else act


# ---- mixture of experts ----


@lower.register
def _(op: p.MixtureOfExperts, to: Lowering) -> Act:
    vector, added = to.weights.vector, Added.of(op, to.exact)
    router, router_bias = to.weights.matrix(op.router), vector(op.router_bias)
    gate = None if op.gate is None else to.weights.matrix(op.gate)
    experts = Experts(
        gate, to.weights.matrix(op.up), to.weights.matrix(op.down),
        (vector(op.gate_bias), vector(op.up_bias), vector(op.down_bias)),
        op, added, to.exact,
    )  # fmt: skip
    exact, dtype = to.exact, to.type_of(op.out)

    def act(run: Run) -> Tensor:
        x, segments = run[op.x], added.segments(run)
        logits = linear.linear(x, router, bias=router_bias, exact=exact, dtype=torch.float32)
        added.add(run, logits, x, (op.router.role, 0))
        groups = () if op.shared is None else run.groups[op.shared.name]
        chosen, shares = route(op, logits, groups)

        def fused(_: Run) -> Tensor:
            return experts.together(x, chosen, shares)

        if segments:
            y = _changed(fused, run, experts.adapted(run, x, chosen, shares), segments)
        else:
            y = fused(run)
        y = y if op.scale == 1 else y * op.scale
        return (y if op.residual is None else run[op.residual] + y).to(dtype)

    return act
