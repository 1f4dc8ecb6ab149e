"""Runs a program in plain NumPy: the second opinion for every other executor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall.batch import Batch, Mixture, Sequences
from squall.checkpoints.base import Checkpoint, tap_by_tap
from squall.program import (
    Add,
    AllReduce,
    Attend,
    Concatenate,
    ConcatenateRows,
    Embed,
    GatedLinear,
    GatherColumns,
    GatherRows,
    GroupNormalize,
    Linear,
    Matrix,
    MixtureOfExperts,
    Modulate,
    Normalize,
    Overlay,
    Program,
    Recall,
    RopeAngles,
    Rotate,
    Site,
    Slice,
    Softcap,
    Value,
    Vector,
    sites,
)
from squall.quant import FORMATS
from squall.weights import Stored, Term

Array = NDArray[np.float32]


def gelu(x: Array) -> Array:
    return np.float32(0.5) * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sparse_mixer(
    logits: NDArray[np.float64], chosen: NDArray[np.int64], jitter: float
) -> NDArray[np.float64]:
    """The scores of the chosen; those of the others are 0."""
    scores = np.zeros_like(logits)
    for row, y in enumerate(logits):
        left = y.copy()
        for e in chosen[row]:
            best = left.max()
            near = (best - y) / np.maximum(np.abs(y), best) <= 2 * jitter
            scores[row, e] = softmax(np.where(near, left, -np.inf))[e]
            left[e] = -np.inf
    return scores


def floats(stored: Stored) -> Array:
    values = FORMATS[stored.format].dequantize(stored.data)
    assert stored.factors is None
    return values


def added(term: Term, x: Array, rows: int, table: bool) -> Array:
    """What an adapter adds to one row of a product, or of a table."""
    wide = x if term.a is None else floats(term.a).reshape(-1, term.rank if table else len(x))
    if term.a is not None:
        wide = wide[x] if table else wide @ x
    y = wide if term.b is None else floats(term.b).reshape(rows, -1) @ wide
    y = np.float32(term.scale) * y
    return y if term.bias is None else y + term.bias


ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": gelu,
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    ),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x.astype(np.float64))),
    "relu": lambda x: np.maximum(x, 0),
}


class ReferenceMemory:
    """What a sequence recalls: keys and values, [rows, width], for each of the program's."""

    def __init__(self, program: Program, rows: int) -> None:
        widths = [layer.kv_heads * layer.head_dim for layer in program.memories]
        self.at = [np.zeros((2, rows, width), np.float32) for width in widths]

    def write(self, first: int, keys: Sequence[Array], values: Sequence[Array]) -> None:
        """As `executors.Memory` does."""
        for own, *new in zip(self.at, keys, values, strict=True):
            own[:, first : first + len(new[0])] = new


class ReferenceExecutor:
    """Float32 values, float64 where sums are long; the interface of `NativeExecutor`."""

    kv_bytes = 0

    def __init__(
        self,
        program: Program,
        checkpoint: Checkpoint,
        *,
        blocks: int,
        block_size: int = 16,
        keep: Sequence[str] = (),
        others: Mapping[str, Checkpoint] | None = None,
        **_unused: Any,
    ) -> None:
        self.program = program
        self.checkpoints = {"": checkpoint} | dict(others or {})
        self.block_size = block_size
        self.keep = frozenset(keep)
        self.sum: Callable[[Array], Array] = lambda x: x  # over ranks, if there are others
        self.values: dict[str, Array] = {}
        self.indices: dict[str, NDArray[np.int32]] = {}
        self.sequences: Sequences | None = None
        self.mixtures: Sequence[Mixture] = ()
        self.weights = {w: self._load(w) for w in program.weights()}
        shapes = [(blocks * block_size, c.kv_heads, c.head_dim) for c in program.caches]
        self.k = [np.zeros(shape, np.float32) for shape in shapes]
        self.v = [np.zeros(shape, np.float32) for shape in shapes]

    def step(self, batch: Batch) -> Array:
        """The logits of the rows of `batch.outputs`."""
        return self.run(
            batch.inputs(self.program.indices, self.program.inputs), batch, batch.mixtures
        )["logits"]

    def adapter(self, terms: Mapping[Site, Term]) -> Mapping[Site, Term]:
        """For mixtures."""
        return terms

    def memory(self, rows: int) -> ReferenceMemory:
        """For sequences."""
        return ReferenceMemory(self.program, rows)

    def run(
        self,
        inputs: dict[str, NDArray[Any]],
        sequences: Sequences | None = None,
        mixtures: Sequence[Mixture] = (),
        **_unused: Any,
    ) -> dict[str, Array]:
        """The outputs by name."""
        program, self.sequences, self.mixtures = self.program, sequences, mixtures
        self.indices = {index.name: inputs[index.name] for index in program.indices}
        self.values = {value.name: inputs[value.name] for value in program.inputs}
        rows = {index.rows: inputs[index.name].shape[-1] for index in program.indices}
        rows |= {value.rows: len(inputs[value.name]) for value in program.inputs}
        for op in program.ops:
            out = np.asarray(HANDLERS[type(op)](self, op), np.float32)
            assert out.shape == (rows[op.out.rows], op.out.width), op
            assert op.out.name not in self.values, op
            self.values[op.out.name] = out
        return {value.name: self.values[value.name] for value in program.outputs}

    def value(self, name: str) -> Array:
        """A kept value of the last step."""
        assert name in self.keep
        return self.values[name]

    def _load(self, weight: Matrix | Vector) -> Array:
        data = np.concatenate([self._slice(part, weight) for part in weight.slices])
        if isinstance(weight, Vector):
            assert data.shape == (weight.part.whole if weight.part else weight.size,)
            start = weight.part.start if weight.part else 0
            return data[start : start + weight.size] + np.float32(weight.offset)
        row, col = (part.start if part else 0 for part in (weight.rows_of, weight.cols_of))
        data = data.reshape(weight.experts, *weight.whole)
        return data[:, row : row + weight.rows, col : col + weight.cols]

    def _slice(self, part: Slice, weight: Matrix | Vector) -> Array:
        tensor = self.checkpoints[part.source].tensors[part.tensor]
        data = (tensor if part.taps == 1 else tap_by_tap(tensor, part.taps)).to_float32()
        data = data.reshape((-1, weight.whole[1]) if isinstance(weight, Matrix) else -1)
        return data[part.start : part.stop]

    def of(self, value: Value) -> Array:
        return self.values[value.name]

    def matrix(self, weight: Matrix) -> Array:
        assert weight.experts == 1
        return self.weights[weight][0]

    def bias(self, weight: Vector | None) -> Array | float:
        return 0.0 if weight is None else self.weights[weight]

    def product(
        self, op: Any, weight: Matrix, x: Array, expert: int = 0, row: int | None = None
    ) -> Array:
        """x @ weight.T, or rows of a table, and what adapters add; row: the only one x has."""
        table, w = isinstance(op, Embed), self.weights[weight][expert]
        y = w[x] if table else x @ w.T
        if (adapters := op.adapters) is None:
            return y
        at, site = slice(None) if row is None else slice(row, row + 1), (weight.role, expert)
        column = adapters.columns[sites(op).index(site)] if adapters.columns else -1
        y, inputs = np.atleast_2d(y).copy(), x if table else np.atleast_2d(x)
        for i, mixture in enumerate(self.indices[adapters.mixture.name][at]):
            for number, (adapter, factor) in enumerate(
                self.mixtures[mixture] if mixture >= 0 else ()
            ):
                if adapters.scalings is not None:
                    if column < 0:
                        continue
                    factor = factor * self.of(adapters.scalings)[at][i, column + number]
                if term := adapter.get(site):
                    y[i] += np.float32(factor) * added(term, inputs[i], y.shape[1], table)
        return y if row is None else y[0]

    def embed(self, op: Embed) -> Array:
        ids = self.indices[op.index.name]
        return self.product(op, op.table, ids) * np.float32(op.scale)

    def rope_angles(self, op: RopeAngles) -> Array:
        positions = np.atleast_2d(self.indices[op.positions.name]).astype(np.float64)
        angles = positions[list(op.axes or [0] * len(op.frequencies))].T * np.array(op.frequencies)
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * op.magnitude

    def normalize(self, op: Normalize) -> Array:
        rows = self.of(op.x)
        width = rows.shape[1]
        x = rows.reshape(len(rows), width // op.group, op.group).astype(np.float64)
        if op.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + op.eps)
        return x.reshape(rows.shape) * self.tiled(op.weight, width) + self.tiled(op.bias, width)

    def tiled(self, weight: Vector | None, width: int) -> Array | float:
        return 0.0 if weight is None else np.tile(self.weights[weight], width // weight.size)

    def linear(self, op: Linear) -> Array:
        x = self.of(op.x)
        if op.taps is not None:
            taps = np.atleast_2d(self.indices[op.taps.name])
            x = np.concatenate([np.where(t[:, None] < 0, 0, x[t.clip(0)]) for t in taps], axis=1)
        y = self.product(op, op.weight, x) + self.bias(op.bias)
        y = ACTIVATIONS[op.activation](y) * np.float32(op.scale)
        return y if op.residual is None else self.of(op.residual) + y

    def gated_linear(self, op: GatedLinear) -> Array:
        x = self.of(op.x)
        gate = self.product(op, op.gate, x) + self.bias(op.gate_bias)
        return ACTIVATIONS[op.activation](gate) * (
            self.product(op, op.up, x) + self.bias(op.up_bias)
        )

    def rotate(self, op: Rotate) -> Array:
        rows, dims = self.of(op.x), op.angles.width
        x = rows.reshape(len(rows), op.heads, op.head_dim).copy()
        cos, sin = np.split(self.of(op.angles)[:, None, :], 2, axis=2)
        half = dims // 2
        a, b = (
            (slice(0, dims, 2), slice(1, dims, 2))
            if op.interleaved
            else (slice(0, half), slice(half, dims))
        )
        first, second = x[..., a].copy(), x[..., b].copy()
        x[..., a] = first * cos - second * sin
        x[..., b] = second * cos + first * sin
        return x.reshape(rows.shape)

    def attend(self, op: Attend) -> Array:
        q, k, v = self.of(op.q), *(self._heads(x, op.kv_heads) for x in (op.k, op.v))
        spans = self.indices[op.spans.name]
        own = np.arange(len(q)) if op.cache is None else self._sequences.positions
        if op.window is not None:
            spans = np.stack([np.maximum(spans[0], own + 1 - op.window), spans[1]])
        if op.cache is None:
            return self._attend(op, q, k, v, spans)
        sequences, out = self._sequences, np.empty_like(q)
        for table, rows in zip(sequences.block_tables, self._rows(), strict=False):
            if rows.start == rows.stop:
                continue
            past = np.arange(sequences.positions[rows.stop - 1] + 1)
            slots = table[past // self.block_size] * self.block_size + past % self.block_size
            keys, values = self.k[op.cache], self.v[op.cache]
            keys[slots[sequences.positions[rows]]] = k[rows]
            values[slots[sequences.positions[rows]]] = v[rows]
            out[rows] = self._attend(op, q[rows], keys[slots], values[slots], spans[:, rows])
        return out

    def recall(self, op: Recall) -> Array:
        q, seen = self.of(op.q), self.indices[op.seen.name]
        out = np.zeros_like(q)
        for memory, rows in zip(self._sequences.memories, self._rows(), strict=False):
            if memory is not None and rows.start < rows.stop:
                k, v = (x.reshape(len(x), op.kv_heads, -1) for x in memory.at[op.memory])
                out[rows] = self._attend(op, q[rows], k, v, seen[:, rows])
        return out

    @property
    def _sequences(self) -> Sequences:
        assert self.sequences is not None
        return self.sequences

    def _rows(self) -> list[slice]:
        bounds = self._sequences.bounds.tolist()
        return [slice(*pair) for pair in pairwise(bounds)]

    def _heads(self, x: Value, heads: int) -> Array:
        rows = self.of(x)
        return rows.reshape(len(rows), heads, x.width // heads)

    def _attend(
        self, op: Attend | Recall, q: Array, k: Array, v: Array, spans: NDArray[np.int32]
    ) -> Array:
        group = op.heads // op.kv_heads
        k, v = (np.repeat(x, group, axis=1) for x in (k, v))
        q = q.reshape(len(q), op.heads, op.head_dim)
        scores = np.einsum("qhd,khd->hqk", q, k, optimize=True).astype(np.float64) * op.scale
        if isinstance(op, Attend) and op.relative is not None:
            n = len(op.buckets) // 2
            apart = np.clip(np.arange(len(k)) - np.arange(len(q))[:, None], -n, n) + n
            biases = self.weights[op.relative].reshape(-1, op.heads)
            scores += biases[np.array(op.buckets)[apart]].transpose(2, 0, 1)
        if isinstance(op, Attend) and op.softcap is not None:
            scores = op.softcap * np.tanh(scores / op.softcap)
        begin, end = spans[:, :, None]
        past = np.arange(len(k))
        seen = (begin <= past) & (past < end)
        scores = np.where(seen, scores, -1e300)
        peak = scores.max(axis=-1, keepdims=True, initial=-1e300)
        weights = np.where(seen, np.exp(scores - peak), 0)
        weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
        mixed = np.einsum("hqk,khd->qhd", weights.astype(np.float32), v, optimize=True)
        return mixed.reshape(len(q), op.heads * op.head_dim)

    def mixture(self, op: MixtureOfExperts) -> Array:
        x = self.of(op.x)
        logits = self.product(op, op.router, x) + self.bias(op.router_bias)
        logits = logits.astype(np.float64)
        scores = softmax(logits)
        if op.shared is not None:
            shared = self.indices[op.shared.name]
            scores = np.array([scores[shared == number].mean(axis=0) for number in shared])
        ranked = logits if op.shared is None else scores
        chosen = np.argsort(-ranked, axis=1, kind="stable")[:, : op.top_k]
        scores = scores if op.jitter is None else sparse_mixer(logits, chosen, op.jitter)
        out = np.zeros_like(x)
        for row, experts in enumerate(chosen):
            total = scores[row, experts].sum() if op.normalize else 1.0
            for e in experts:
                share = 1.0 if op.shared is not None else scores[row, e] / total
                out[row] += np.float32(share) * self.expert(op, e, row)
        out *= np.float32(op.scale)
        return out if op.residual is None else self.of(op.residual) + out

    def expert(self, op: MixtureOfExperts, e: int, row: int) -> Array:
        def part(weight: Matrix, bias: Vector | None, x: Array) -> Array:
            added = 0.0 if bias is None else self.weights[bias].reshape(weight.experts, -1)[e]
            return self.product(op, weight, x, e, row) + added

        x, activation = self.of(op.x)[row], ACTIVATIONS[op.activation]
        inner = part(op.up, op.up_bias, x)
        if op.gate is None:
            inner = activation(inner)
        else:
            inner = activation(part(op.gate, op.gate_bias, x)) * inner
        return part(op.down, op.down_bias, inner)

    def add(self, op: Add) -> Array:
        b = np.float32(op.scale) * self.of(op.b)
        if op.gate is not None:
            b = self.of(op.gate)[:1, op.column : op.column + op.b.width] * b
        return ACTIVATIONS[op.activation](self.of(op.a) + b)

    def modulate(self, op: Modulate) -> Array:
        x = self.of(op.x).astype(np.float64)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + op.eps)
        shift, scale = (self.of(op.by)[:1, at : at + op.x.width] for at in (op.shift, op.scale))
        return x * (1 + scale) + shift

    def group_normalize(self, op: GroupNormalize) -> Array:
        x = self.of(op.x).astype(np.float64).reshape(-1, op.groups, op.x.width // op.groups)
        x = x - x.mean(axis=(0, 2), keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=(0, 2), keepdims=True) + op.eps)
        y = x.reshape(-1, op.x.width) * self.weights[op.weight] + self.weights[op.bias]
        return ACTIVATIONS[op.activation](y)

    def concatenate_rows(self, op: ConcatenateRows) -> Array:
        return np.concatenate([self.of(op.a), self.of(op.b)])

    def softcap(self, op: Softcap) -> Array:
        return op.cap * np.tanh(self.of(op.x) / op.cap)

    def gather_rows(self, op: GatherRows) -> Array:
        rows = self.of(op.x)[np.atleast_2d(self.indices[op.index.name])]
        return rows.mean(axis=0) if op.mean else np.concatenate(rows, axis=1)

    def overlay(self, op: Overlay) -> Array:
        index, rows = self.indices[op.index.name], self.of(op.rows)
        out = self.of(op.x).copy()
        out[index >= 0] = rows[index[index >= 0]]
        return out

    def concatenate(self, op: Concatenate) -> Array:
        return np.concatenate([self.of(op.a), self.of(op.b)], axis=1)

    def all_reduce(self, op: AllReduce) -> Array:
        return self.sum(self.of(op.x))

    def gather_columns(self, op: GatherColumns) -> Array:
        return self.of(op.x)[:, np.frombuffer(op.order, "<u4")]


HANDLERS: dict[type, Callable[[ReferenceExecutor, Any], Array]] = {
    Embed: ReferenceExecutor.embed,
    RopeAngles: ReferenceExecutor.rope_angles,
    Normalize: ReferenceExecutor.normalize,
    Linear: ReferenceExecutor.linear,
    GatedLinear: ReferenceExecutor.gated_linear,
    Rotate: ReferenceExecutor.rotate,
    Attend: ReferenceExecutor.attend,
    MixtureOfExperts: ReferenceExecutor.mixture,
    Add: ReferenceExecutor.add,
    Softcap: ReferenceExecutor.softcap,
    Recall: ReferenceExecutor.recall,
    GatherRows: ReferenceExecutor.gather_rows,
    Overlay: ReferenceExecutor.overlay,
    Concatenate: ReferenceExecutor.concatenate,
    GatherColumns: ReferenceExecutor.gather_columns,
    AllReduce: ReferenceExecutor.all_reduce,
    Modulate: ReferenceExecutor.modulate,
    GroupNormalize: ReferenceExecutor.group_normalize,
    ConcatenateRows: ReferenceExecutor.concatenate_rows,
}
