"""What ops are on PyTorch's devices: each is lowered once, to a function of a run.

A row's bytes depend on no other row. Of PyTorch's functions only those are used that treat all
places of a tensor alike; on the CPU sigmoid, silu, and sums of very wide rows do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squall import program as p
from squall.executors.parallel import Ranks
from squall.gpu import attention, linear, matrices, rows
from squall.gpu.adapters import Added, TorchMixture
from squall.gpu.inputs import Given, Segment

if TYPE_CHECKING:
    from squall.gpu.executor import TorchMemory


@dataclass(frozen=True, slots=True)
class Run:
    """What ops read of a run, and the values that they make, by id."""

    values: dict[int, Tensor]
    indices: Mapping[str, Tensor]
    rows: attention.Rows | None
    memories: Sequence[TorchMemory | None]
    mixtures: Sequence[TorchMixture]
    given: Given

    def __getitem__(self, item: p.Value | p.Index) -> Tensor:
        return self.values[item.id] if isinstance(item, p.Value) else self.indices[item.name]

    def segments(self, adapters: p.Adapters | None) -> list[Segment]:
        """The rows that have adapters."""
        return [] if adapters is None else self.given.segments[adapters.mixture.name]

    def groups(self, shared: p.Index | None) -> list[Tensor]:
        """The rows that share, group by group."""
        found = () if shared is None else self.given.groups[shared.name]
        return [self.indices[f"{shared and shared.name}.{i}"] for i in range(len(found))]


Act = Callable[[Run], Tensor]


@dataclass(frozen=True, slots=True)
class Lowering:
    """What ops become functions of.

    types: of values; results are cast to them where need be. ranks: those that run parts of the
        model.
    """

    weights: matrices.Matrices
    caches: Sequence[attention.Cache]
    device: torch.device
    types: Mapping[p.Value, torch.dtype]
    exact: bool
    ranks: Ranks | None = None

    def tensor(self, values: Sequence[float] | NDArray[np.int32], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)


def types(program: p.Program, dtype: torch.dtype) -> dict[p.Value, torch.dtype]:
    """float32 for angles, scalings of adapters and what only leaves the program; else dtype."""
    read = {value for op in program.ops for value in p.reads(op)}
    wide = {value for value in program.outputs if value not in read}
    for op in reversed(program.ops):
        adapters = getattr(op, "adapters", None)
        if isinstance(op, p.Rotate):
            wide.add(op.angles)
        elif isinstance(op, p.Softcap) and op.out in wide:
            wide.add(op.x)
        elif adapters is not None and adapters.scalings is not None:
            wide.add(adapters.scalings)
    return {value: torch.float32 if value in wide else dtype for value in program.values}


def fits(op: p.Op) -> bool:
    """Whether an op's values and weights have the sizes that it needs."""
    out = op.out.width
    match op:
        case p.Embed():
            return op.table.cols == out
        case p.Normalize():
            size = op.weight.size
            whole = op.x.width % op.group == 0 and size in (op.group, out)
            return whole and _even((op.x, out), (op.bias, size))
        case p.Linear():
            taps = 1 if op.taps is None else op.taps.axes
            fits = _multiplies(op.weight, taps * op.x.width, out, op.bias)
            return fits and _even((op.residual, out)) and not (op.taps and op.adapters)
        case p.GatedLinear():
            parts = (op.gate, op.gate_bias), (op.up, op.up_bias)
            return all(_multiplies(w, op.x.width, out, bias) for w, bias in parts)
        case p.MixtureOfExperts():
            x, inner, count = op.x.width, op.up.rows, op.up.experts
            ends = (op.gate, x, inner, op.gate_bias), (op.up, x, inner, op.up_bias)
            weights = *ends, (op.down, inner, out, op.down_bias)
            alike = all(w is None or w.experts == count for w, *_ in weights)
            fits = op.top_k <= count and _multiplies(op.router, x, count, op.router_bias)
            return alike and fits and all(_multiplies(*weight) for weight in weights)
        case p.Rotate():
            width = op.heads * op.head_dim
            return _even((op.x, width), (op.out, width)) and op.angles.width <= op.head_dim
        case p.Attend() | p.Recall():
            width, own = op.heads * op.head_dim, op.kv_heads * op.head_dim
            stored = ((op.k, own), (op.v, own)) if isinstance(op, p.Attend) else ()
            even = _even((op.q, width), (op.out, width), *stored)
            return op.heads % op.kv_heads == 0 and even and _measures(op)
        case p.Add() | p.Modulate() | p.GroupNormalize() | p.ConcatenateRows():
            return _keeps(op)
    return True


def _keeps(op: p.Add | p.Modulate | p.GroupNormalize | p.ConcatenateRows) -> bool:
    """Whether an op that keeps the width of what it reads has the sizes that it needs."""
    out = op.out.width
    match op:
        case p.Add():
            even = _even((op.a, out), (op.b, out)) and op.a.rows == op.b.rows == op.out.rows
            return even and (op.gate is None or _has(op.gate, out, op.column))
        case p.Modulate():
            even = _even((op.x, out)) and op.x.rows == op.out.rows
            return even and _has(op.by, out, op.shift, op.scale)
        case p.GroupNormalize():
            even = _even((op.x, out), (op.weight, out), (op.bias, out))
            return even and out % op.groups == 0 and op.x.rows == op.out.rows
        case p.ConcatenateRows():
            return _even((op.a, out), (op.b, out))


def _has(row: p.Value, width: int, *columns: int) -> bool:
    return all(0 <= column <= row.width - width for column in columns)


def _measures(op: p.Attend | p.Recall) -> bool:
    """Whether the distances of an attention, if it has some, are there."""
    if isinstance(op, p.Recall) or op.relative is None:
        return True
    count, rest = divmod(op.relative.size, op.heads)
    known = all(0 <= bucket < count for bucket in op.buckets)
    return op.cache is None and rest == 0 and len(op.buckets) % 2 == 1 and known


def _even(*sizes: tuple[p.Value | p.Vector | None, int]) -> bool:
    return all(
        item is None or needed == (item.width if isinstance(item, p.Value) else item.size)
        for item, needed in sizes
    )


def _multiplies(w: p.Matrix | None, x: int, out: int, bias: p.Vector | None) -> bool:
    return w is None or ((w.cols, w.rows) == (x, out) and _even((bias, w.experts * out)))


@functools.singledispatch
def lower(op: p.Op, to: Lowering) -> Act:  # noqa: ARG001
    """The op as a function of a run."""
    return functools.partial(_act.dispatch(type(op)), op)


@functools.singledispatch
def _act(op: p.Op, run: Run) -> Tensor:  # noqa: ARG001
    """What an op makes that needs nothing beside what the run has."""
    raise AssertionError(f"no lowering of {type(op).__name__}")


# ---- rows ----


@lower.register
def _(op: p.Normalize, to: Lowering) -> Act:
    weight, bias = to.weights.vector(op.weight), to.weights.vector(op.bias)
    assert weight is not None
    return lambda run: rows.normalize(run[op.x], weight, bias, op.kind, op.eps, op.group)


@lower.register
def _(op: p.RopeAngles, to: Lowering) -> Act:
    frequencies = to.tensor(op.frequencies, torch.float32)
    axes = to.tensor(op.axes or (0,) * len(op.frequencies), torch.int32)

    def act(run: Run) -> Tensor:
        positions = run[op.positions]
        positions = positions[:, None] if positions.ndim < 2 else positions.T
        angles = positions.index_select(1, axes).float() * frequencies
        return torch.cat((torch.cos(angles), torch.sin(angles)), 1) * op.magnitude

    return act


@_act.register
def _(op: p.Rotate, run: Run) -> Tensor:
    return rows.rotate(run[op.x], run[op.angles], op.heads, op.head_dim, op.interleaved)


@lower.register
def _(op: p.Add, to: Lowering) -> Act:
    def act(run: Run) -> Tensor:
        b = run[op.b] if op.scale == 1 else run[op.b].float() * op.scale
        if op.gate is not None:
            b = _columns(run[op.gate], op.column, op.b.width) * b
        y = run[op.a] + b
        return linear.activated(y.float(), op.activation, exact=to.exact) if op.activation else y

    return act


def _columns(row: Tensor, first: int, count: int) -> Tensor:
    return row[0, first : first + count].float()


@_act.register
def _(op: p.Modulate, run: Run) -> Tensor:
    shift, scale = (_columns(run[op.by], at, op.x.width) for at in (op.shift, op.scale))
    return rows.normalize(run[op.x], 1 + scale, shift, "layer", op.eps, op.x.width)


@lower.register
def _(op: p.GroupNormalize, to: Lowering) -> Act:
    weight, bias = to.weights.vector(op.weight), to.weights.vector(op.bias)
    assert weight is not None
    assert bias is not None

    finish = functools.partial(linear.activated, activation=op.activation, exact=to.exact)
    return lambda run: rows.group_normalize(op, run[op.x], weight, bias, finish)


@_act.register
def _(op: p.Softcap, run: Run) -> Tensor:
    return torch.tanh(run[op.x].float() / op.cap) * op.cap


@_act.register
def _(op: p.Concatenate, run: Run) -> Tensor:
    return torch.cat((run[op.a], run[op.b]), 1)


@_act.register
def _(op: p.ConcatenateRows, run: Run) -> Tensor:
    return torch.cat((run[op.a], run[op.b]))


@lower.register
def _(op: p.GatherColumns, to: Lowering) -> Act:
    order = to.tensor(np.frombuffer(op.order, "<u4").astype(np.int32), torch.int32)
    return lambda run: run[op.x].index_select(1, order)


@_act.register
def _(op: p.GatherRows, run: Run) -> Tensor:
    x, index = run[op.x], run[op.index]
    found = [x.index_select(0, own) for own in (index if index.ndim > 1 else index[None])]
    if not op.mean:
        return torch.cat(found, 1)
    return functools.reduce(torch.add, found[1:], found[0].float()) * (1 / len(found))


@_act.register
def _(op: p.Overlay, run: Run) -> Tensor:
    x, over, index = run[op.x], run[op.rows], run[op.index]
    if not len(over):
        return x
    return torch.where((index >= 0)[:, None], over.index_select(0, index.clamp(min=0)), x)


@lower.register
def _(op: p.AllReduce, to: Lowering) -> Act:
    ranks = to.ranks
    assert ranks is not None
    return lambda run: ranks.sum(run[op.x], exact=to.exact)


# ---- attention ----


@lower.register
def _(op: p.Attend, to: Lowering) -> Act:
    exact = to.exact
    if op.cache is None:
        relative = to.weights.vector(op.relative)
        if relative is not None:
            relative = relative.view(-1, op.heads)[to.tensor(op.buckets, torch.int32)]
        return lambda run: attention.attend_here(
            op, run[op.q], run[op.k], run[op.v], run[op.spans], exact=exact, relative=relative
        )
    cache = to.caches[op.cache]

    def act(run: Run) -> Tensor:
        assert run.rows is not None
        attention.store(cache, run[op.k], run[op.v], run.rows)
        return attention.attend(op, run[op.q], cache, run[op.spans], run.rows, exact=exact)

    return act


@lower.register
def _(op: p.Recall, to: Lowering) -> Act:
    exact = to.exact

    def act(run: Run) -> Tensor:
        q, seen = run[op.q], run[op.seen]
        if not any(run.memories):
            return torch.zeros_like(q)
        assert run.rows is not None
        own = [None if memory is None else memory.at[op.memory] for memory in run.memories]
        return attention.recall(op, q, own, seen, run.rows, exact=exact)

    return act


# ---- products ----


def _adaptable(adapters: p.Adapters | None, fused: Act, changed: Act) -> Act:
    """Rows with adapters as `changed` has them; the others as if there were no adapters."""

    def act(run: Run) -> Tensor:
        segments = run.segments(adapters)
        if not segments:
            return fused(run)
        other = changed(run)
        if sum(stop - start for start, stop, _ in segments) == len(other):
            return other
        out = fused(run)
        for start, stop, _ in segments:
            out[start:stop] = other[start:stop]
        return out

    return fused if adapters is None else act


@lower.register
def _(op: p.Embed, to: Lowering) -> Act:
    table, added = to.weights.matrix(op.table), Added.of(op, to.exact)

    def fused(run: Run) -> Tensor:
        return linear.embed(run[op.index], table, scale=op.scale, dtype=to.types[op.out])

    def changed(run: Run) -> Tensor:
        y = matrices.lookup(table, run[op.index])
        added.add(run, y, (op.table.role, 0))
        return y * op.scale

    return _adaptable(op.adapters, fused, changed)


@lower.register
def _(op: p.Linear, to: Lowering) -> Act:
    vector, exact, added = to.weights.vector, to.exact, Added.of(op, to.exact)
    product = linear.Product(
        to.weights.matrix(op.weight), vector(op.bias), op.activation, scale=op.scale
    )

    def fused(run: Run) -> Tensor:
        residual = None if op.residual is None else run[op.residual]
        dtype, x = to.types[op.out], run[op.x]
        if op.taps is not None:
            taps = run[op.taps].view(op.taps.axes, -1)
            return linear.convolved(x, product, taps, residual=residual, exact=exact, dtype=dtype)
        return linear.linear(x, product, residual=residual, exact=exact, dtype=dtype)

    def changed(run: Run) -> Tensor:
        y = added.product(run, run[op.x], op.weight, product.weight, product.bias)
        y = linear.activated(y, op.activation, exact=exact) * op.scale
        return y if op.residual is None else run[op.residual] + y

    return _adaptable(op.adapters, fused, changed)


@lower.register
def _(op: p.GatedLinear, to: Lowering) -> Act:
    gate, up = to.weights.matrix(op.gate), to.weights.matrix(op.up)
    gate_bias, up_bias = to.weights.vector(op.gate_bias), to.weights.vector(op.up_bias)
    product = linear.Product(up, up_bias, op.activation, gate, gate_bias)
    exact, added = to.exact, Added.of(op, to.exact)

    def fused(run: Run) -> Tensor:
        return linear.linear(run[op.x], product, exact=exact)

    def changed(run: Run) -> Tensor:
        first = added.product(run, run[op.x], op.gate, gate, gate_bias)
        second = added.product(run, run[op.x], op.up, up, up_bias)
        return linear.activated(first, op.activation, exact=exact) * second

    return _adaptable(op.adapters, fused, changed)


# ---- mixture of experts ----


def _route(
    op: p.MixtureOfExperts, logits: Tensor, groups: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Each row's experts, best first, int32 [rows, top_k]; and their shares.

    groups: rows that have one expert together. Nothing waits for the device.
    """
    if op.shared is not None:
        scores = torch.softmax(logits, 1)
        for own in groups:
            scores[own] = rows.total(scores[own].T)[:, 0]
        chosen = _ranked(scores, op.top_k)
        return chosen.int(), torch.ones_like(chosen, dtype=torch.float32)
    chosen = _ranked(logits, op.top_k)
    if op.jitter is None:
        shares = torch.softmax(logits, 1).gather(1, chosen)
    else:
        shares = _near(logits, chosen, op.jitter)
    return chosen.int(), shares / rows.total(shares) if op.normalize else shares


def _ranked(scores: Tensor, top_k: int) -> Tensor:
    """The best first, and among equals the lower index."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :top_k]


def _near(logits: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """Of each chosen one its part of a softmax over those near it and not chosen before it."""
    shares, left = [], logits
    for one in chosen.unbind(1):
        best = logits.gather(1, one[:, None])
        far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * jitter
        near = torch.softmax(left.masked_fill(far, -torch.inf), 1)
        shares.append(near.gather(1, one[:, None]))
        left = left.scatter(1, one[:, None], -torch.inf)
    return torch.cat(shares, 1)


@lower.register
def _(op: p.MixtureOfExperts, to: Lowering) -> Act:
    matrix, vector, exact = to.weights.matrix, to.weights.vector, to.exact
    added = Added.of(op, exact)
    router = linear.Product(matrix(op.router), vector(op.router_bias))
    gate = None if op.gate is None else matrix(op.gate)
    inner = linear.Product(
        matrix(op.up), vector(op.up_bias), op.activation, gate, vector(op.gate_bias)
    )
    down = linear.Product(matrix(op.down), vector(op.down_bias))

    def adapted(run: Run, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        sums = x.new_zeros(len(x), down.weight.rows, dtype=torch.float32)
        scalings = added.scalings(run)
        for start, stop, number in run.segments(op.adapters):
            own = slice(start, stop)
            scaling = None if scalings is None else scalings[own]
            add = added.to_experts(op, run.mixtures[number], scaling)
            routed = chosen[own], shares[own]
            sums[own] = linear.expert_by_expert(x[own], routed, inner, down, exact, add)
        return sums

    def act(run: Run) -> Tensor:
        x = run[op.x]
        logits = linear.linear(x, router, exact=exact, dtype=torch.float32)
        added.add(run, logits, (op.router.role, 0))
        chosen, shares = _route(op, logits, run.groups(op.shared))
        y = _adaptable(
            op.adapters,
            lambda _: linear.experts(x, chosen, shares, inner, down, exact=exact),
            lambda run: adapted(run, x, chosen, shares),
        )(run)
        y = y if op.scale == 1 else y * op.scale
        return y if op.residual is None else run[op.residual] + y

    return act
