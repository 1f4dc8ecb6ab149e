"""A program: a flat list of ops on symbolic values. Built at load, run by an executor every step.

A value is a float32 matrix `[rows, width]`. `width` is fixed here; how many rows a row space has is
known at run time. A decoder's spaces are the "tokens" of the step, and the "outputs": those whose
logits are wanted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal, TypeVar

from squall.spec import Activation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Value:
    """A symbolic activation `[rows, width]`."""

    id: int
    name: str
    width: int
    rows: str = "tokens"


@dataclass(frozen=True, slots=True)
class Index:
    """Whole numbers that come with a run: int32 `[rows]`, or `[axes, rows]`."""

    name: str
    rows: str = "tokens"
    axes: int = 1


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows `start:stop` of a checkpoint tensor seen as a matrix; elements, if it is a vector.

    source: which checkpoint's, where there are others beside the model's own.
    transposed: the tensor has columns where the matrix has rows.
    taps: it is a convolution's, [rows, channels, taps], whose matrix has columns tap by tap.
    """

    tensor: str
    start: int
    stop: int
    source: str = ""
    transposed: bool = False
    taps: int = 1


Names = Mapping[str, tuple[Slice, ...]]
"""Where each weight of a decoder (a role of `squall.roles`) lies in a checkpoint."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows, columns or elements `start:stop` of a `whole`."""

    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight `[experts * rows, cols]`: slices of checkpoint tensors, one after another.

    role: what it is in the decoder, such as `layers.3.attention.q`.
    restored: columns that are stored in an order of their own go back where they belong.
    rows_of, cols_of: which rows of every expert and which columns it has, if not all.
    """

    slices: tuple[Slice, ...]
    rows: int
    cols: int
    experts: int = 1
    role: str = ""
    restored: bool = False
    rows_of: Part | None = None
    cols_of: Part | None = None

    @property
    def whole(self) -> tuple[int, int]:
        """Rows of an expert, and columns, in the slices."""
        rows, cols = self.rows_of, self.cols_of
        return rows.whole if rows else self.rows, cols.whole if cols else self.cols


@dataclass(frozen=True, slots=True)
class Vector:
    """A float32 weight `[size]`; `offset` is added to every element at load.

    role: what it is in the decoder, such as `layers.3.attention.q.bias`.
    part: which elements it has, if not all.
    """

    slices: tuple[Slice, ...]
    size: int
    offset: float = 0.0
    role: str = ""
    part: Part | None = None


Site = tuple[str, int]
"""One matrix that adapters may add to: its role, and which expert; a dense weight has expert 0."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """What each row adds to every weight of an op: the sum of w_i * scale_i * B_i @ A_i.

    x: what the A_i multiply; ids, where the weight is a table. mixture: which of the run's mixtures
        of adapters a row has, (adapter, w) in order; negative: none.
    scalings: w_i is multiplied by column `column + i` of it; `columns` has one for each of the op's
        `sites`.
    """

    x: Value | Index
    mixture: Index
    scalings: Value | None = None
    columns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Embed:
    """out = table[index] * scale"""

    out: Value
    index: Index
    table: Matrix
    scale: float = 1.0
    adapters: Adapters | None = None


@dataclass(frozen=True, slots=True)
class RopeAngles:
    """out[:, :n] = magnitude * cos(position * frequencies), out[:, n:] = magnitude * sin(...).

    axes: which axis of `positions` each frequency turns with; by default all with the first.
    """

    out: Value
    positions: Index
    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    axes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Normalize:
    """Norm of each run of `group` columns: of every head by itself, or of the row.

    The weight has `group` elements, the same for every run, or one for each column.
    """

    out: Value
    x: Value
    weight: Vector
    bias: Vector | None
    kind: Literal["rms", "layer"]
    eps: float
    group: int


@dataclass(frozen=True, slots=True)
class Linear:
    """out = residual + scale * activation(x @ weight.T + bias)

    taps: a convolution: in place of x its rows that the index names, side by side; zeros where it
        is negative.
    """

    out: Value
    x: Value
    weight: Matrix
    bias: Vector | None = None
    activation: Activation | None = None
    scale: float = 1.0
    residual: Value | None = None
    adapters: Adapters | None = None
    taps: Index | None = None


@dataclass(frozen=True, slots=True)
class GatedLinear:
    """out = activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias)"""

    out: Value
    x: Value
    gate: Matrix
    up: Matrix
    activation: Activation
    gate_bias: Vector | None = None
    up_bias: Vector | None = None
    adapters: Adapters | None = None


@dataclass(frozen=True, slots=True)
class Rotate:
    """Rotary embedding of the first `angles.width` columns of every head of x."""

    out: Value
    x: Value
    angles: Value
    heads: int
    head_dim: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Attend:
    """Store k and v, then attention of q over what each row sees.

    spans: `[2, rows]`, the first position that a row sees, and one past the last.
    cache: which one k and v are stored in, where positions are those of the row's sequence. None:
        positions are rows of k and v in this run, which may be others than those of q.
    window: so many positions up to the row's own, and what it sees after it.
    relative: added to scores after `scale`, by distance and head, [distances, heads]: `buckets`
        has, for a key's position less its query's from -n to n, which distance that is; beyond n
        as at n. Only without a cache.
    """

    out: Value
    q: Value
    k: Value
    v: Value
    spans: Index
    cache: int | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    relative: Vector | None = None
    buckets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Recall:
    """Attention of q over the memory of its sequence; zeros where there is none.

    seen: `[2, rows]`, the first row of the memory that a row sees, and one past the last.
    memory: which of the program's.
    """

    out: Value
    q: Value
    seen: Index
    memory: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """out = residual + scale * sum of score_e * down_e(activation(gate_e(x)) * up_e(x))

    The sum is over the `top_k` largest scores of softmax(router(x)), the lower index first among
    equals; `normalize` divides them by their sum. Without a gate an expert is
    down_e(activation(up_e(x))). Biases of experts are one after another.

    shared: rows with the same number, that of the first of them, have one expert together: the best
        by the mean of their scores, which then counts as 1.

    With a `jitter` an expert's score is instead its part of a softmax over those logits y not yet
    chosen that are near the best of them, m: (m - y) / max(|y|, m) <= 2 * jitter.
    """

    out: Value
    x: Value
    router: Matrix
    gate: Matrix | None
    up: Matrix
    down: Matrix
    top_k: int
    activation: Activation
    normalize: bool
    jitter: float | None = None
    scale: float = 1.0
    residual: Value | None = None
    adapters: Adapters | None = None
    router_bias: Vector | None = None
    gate_bias: Vector | None = None
    up_bias: Vector | None = None
    down_bias: Vector | None = None
    shared: Index | None = None


@dataclass(frozen=True, slots=True)
class Add:
    """out = activation(a + scale * gate * b)

    gate: a value of one row, of which columns from `column` on are for all rows of b; None: ones.
    """

    out: Value
    a: Value
    b: Value
    scale: float = 1.0
    gate: Value | None = None
    column: int = 0
    activation: Activation | None = None


@dataclass(frozen=True, slots=True)
class Modulate:
    """out = layer_norm(x) * (1 + by[scale]) + by[shift], the norm without weights

    by: a value of one row; shift, scale: the columns in it from which on they are.
    """

    out: Value
    x: Value
    by: Value
    shift: int
    scale: int
    eps: float


@dataclass(frozen=True, slots=True)
class GroupNormalize:
    """out = activation(group norm of x): of each of `groups` runs of columns over all rows.

    Sums are made in a fixed order, however many threads there are.
    """

    out: Value
    x: Value
    weight: Vector
    bias: Vector
    groups: int
    eps: float
    activation: Activation | None = None


@dataclass(frozen=True, slots=True)
class Concatenate:
    """out = the columns of a, then those of b"""

    out: Value
    a: Value
    b: Value


@dataclass(frozen=True, slots=True)
class ConcatenateRows:
    """out = the rows of a, then those of b; its row space has as many as both"""

    out: Value
    a: Value
    b: Value


@dataclass(frozen=True, slots=True)
class Softcap:
    """out = cap * tanh(x / cap)"""

    out: Value
    x: Value
    cap: float


@dataclass(frozen=True, slots=True)
class GatherRows:
    """out[i] = x[index[i]]; of an index with axes, the rows that it names side by side.

    mean: their mean instead.
    """

    out: Value
    x: Value
    index: Index
    mean: bool = False


@dataclass(frozen=True, slots=True)
class Overlay:
    """out[i] = rows[index[i]], and where the index is negative x[i]."""

    out: Value
    x: Value
    rows: Value
    index: Index


@dataclass(frozen=True, slots=True)
class GatherColumns:
    """out[:, i] = x[:, order[i]]; `order` is bytes of little-endian uint32."""

    out: Value
    x: Value
    order: bytes


@dataclass(frozen=True, slots=True)
class AllReduce:
    """out = the sum of x over all ranks, each of which runs a part of the model"""

    out: Value
    x: Value


Op = (
    Embed | RopeAngles | Normalize | Linear | GatedLinear | Rotate | Attend | MixtureOfExperts
    | Add | Concatenate | Softcap | Recall | GatherRows | GatherColumns | Overlay
    | AllReduce | Modulate | GroupNormalize | ConcatenateRows
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """KV cache geometry of one attention layer."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Program:
    """What an executor runs: `ops` in order.

    A run is given `indices` and `inputs`, which have no op that makes them, by their names, and
    gives `outputs`. Those of a decoder are `logits`, [outputs, vocab].
    caches: of attention; a program may have none. context: positions that they have.
    memories: what sequences may have to recall, beside what they say.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    outputs: tuple[Value, ...]
    inputs: tuple[Value, ...] = ()
    caches: tuple[CacheLayer, ...] = ()
    context: int = 1
    memories: tuple[CacheLayer, ...] = ()

    @property
    def indices(self) -> tuple[Index, ...]:
        """Every index, in order of first use."""
        return tuple(_fields_of(self.ops, (Index,)))

    @property
    def spaces(self) -> tuple[str, ...]:
        """Every row space, in order of first use."""
        rows = [*(index.rows for index in self.indices), *(value.rows for value in self.values)]
        return tuple(dict.fromkeys(rows))

    def weights(self) -> list[Matrix | Vector]:
        """Every distinct weight, in order of first use."""
        return _fields_of(self.ops, (Matrix, Vector))

    @property
    def layers(self) -> list[str]:
        """What is made by each layer, in order: names of values."""
        return [op.out.name for op in self.ops if re.fullmatch(r"layers\.\d+", op.out.name)]

    def stages(self, *after: str) -> list[Program]:
        """Programs that together do the same, each up to the op that makes one of these values.

        What one needs of the values that others before it make is an output of theirs and an input
        of its own. All give the same bytes as the whole if linears do not read such a value
        itself, as after a layer: a norm prepares its rows for them in another way than an input.
        """
        at = [i + 1 for i, op in enumerate(self.ops) if op.out.name in after]
        parts = [self.ops[i:j] for i, j in pairwise([0, *at, len(self.ops)])]
        needed = [_fields_of(ops, (Value,)) for ops in parts]
        made = [{op.out for op in ops} for ops in parts]
        found = []
        for number, ops in enumerate(parts):
            later = {value for values in needed[number + 1 :] for value in values}
            outputs = [op.out for op in ops if op.out in later or op.out in self.outputs]
            inputs = [value for value in needed[number] if value not in made[number]]
            found.append(self._part(ops, inputs, outputs))
        return found

    def _part(
        self, ops: Sequence[Op], inputs: Sequence[Value], outputs: Sequence[Value]
    ) -> Program:
        """A program of some of the ops, with the values, caches and memories that they use."""
        attends = [op.cache for op in ops if isinstance(op, Attend)]
        caches = sorted({cache for cache in attends if cache is not None})
        memories = sorted({op.memory for op in ops if isinstance(op, Recall)})
        values = {*inputs, *(op.out for op in ops)}
        return replace(
            self,
            ops=tuple(_renumbered(op, caches, memories) for op in ops),
            values=tuple(value for value in self.values if value in values),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            caches=tuple(self.caches[cache] for cache in caches),
            memories=tuple(self.memories[memory] for memory in memories),
        )

    def describe(self) -> str:
        """The ops as a table: number, kind, output, inputs, weights, parameters."""
        return "\n".join(_line(number, op) for number, op in enumerate(self.ops))


def _renumbered(op: Op, caches: Sequence[int], memories: Sequence[int]) -> Op:
    """The op with the number that its cache or memory has among these."""
    if isinstance(op, Attend) and op.cache is not None:
        return replace(op, cache=caches.index(op.cache))
    return replace(op, memory=memories.index(op.memory)) if isinstance(op, Recall) else op


def name_of(op: Op) -> str:
    """Such as gather_rows."""
    return re.sub("(?!^)([A-Z])", r"_\1", type(op).__name__).lower()


def op_weights(op: Op) -> list[Matrix | Vector]:
    """The weights of an op, in order of its fields."""
    return _parts(op, (Matrix, Vector))


def matrices(op: Op) -> tuple[Matrix, ...]:
    """The matrices of an op, in order of its fields."""
    return tuple(_parts(op, (Matrix,)))


def reads(op: Op) -> tuple[Value, ...]:
    """The values that an op reads."""
    return tuple(_parts(op, (Value,)))


def sites(op: Op) -> tuple[Site, ...]:
    """Where adapters may add to an op: its matrices in order, of experts one by one."""
    return tuple((m.role, expert) for m in matrices(op) for expert in range(m.experts))


def _fields_of(ops: Sequence[Op], kinds: tuple[type[T], ...]) -> list[T]:
    """The distinct things of these kinds that the ops name beside their outputs."""
    return list(dict.fromkeys(item for op in ops for item in _parts(op, kinds)))


def _parts(op: Op | Adapters, kinds: tuple[type[T], ...]) -> list[T]:
    items = [getattr(op, field.name) for field in fields(op) if field.name != "out"]
    found = [item for item in items if isinstance(item, kinds)]
    more = [_parts(item, kinds) for item in items if isinstance(item, Adapters)]
    return [*found, *(part for parts in more for part in parts)]


def _line(number: int, op: Op) -> str:
    given = ((f.name, getattr(op, f.name)) for f in fields(op) if f.name != "out")
    parts = (f"{name}={_text(item)}" for name, item in given if item is not None)
    out = f"{op.out.name}[{op.out.rows},{op.out.width}]"
    return f"{number:4} {type(op).__name__:17} {out}  {' '.join(parts)}"


def _text(item: object) -> str:
    match item:
        case Value() | Index():
            return item.name
        case Matrix():
            experts = f"{item.experts}x" if item.experts > 1 else ""
            return f"{item.slices[0].tensor}[{experts}{item.rows},{item.cols}]"
        case Adapters():
            return item.mixture.name
        case Vector():
            return f"{item.slices[0].tensor}[{item.size}]"
        case tuple() | bytes():
            return f"({len(item)} values)"
    return f"{item:g}" if isinstance(item, float) else str(item)


class Builder:
    """Collects values, and the ops that make them."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: list[Value] = []

    def value(self, name: str, width: int, rows: str = "tokens") -> Value:
        """A new symbolic value."""
        value = Value(len(self.values), name, width, rows)
        self.values.append(value)
        return value

    def emit(self, op: Op) -> Value:
        """Append an op made with a value of `value()`; returns its output."""
        self.ops.append(op)
        return op.out

    def build(
        self,
        *outputs: Value,
        inputs: Sequence[Value] = (),
        caches: Sequence[CacheLayer] = (),
        context: int = 1,
        memories: Sequence[CacheLayer] = (),
    ) -> Program:
        """The finished program."""
        ops, values, given = tuple(self.ops), tuple(self.values), tuple(inputs)
        return Program(ops, values, outputs, given, tuple(caches), context, tuple(memories))
