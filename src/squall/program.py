"""A program: a flat list of ops on symbolic values. Built at load, run by an executor every step.

A value is a float32 matrix `[rows, width]`. `width` is fixed here; `rows` is known at run time: the
tokens of the step, or, after `GatherRows`, the rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from squall.spec import Activation

Rows = Literal["tokens", "outputs"]


@dataclass(frozen=True, slots=True)
class Value:
    """A symbolic activation `[rows, width]`."""

    id: int
    name: str
    width: int
    rows: Rows = "tokens"


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows `start:stop` of a checkpoint tensor seen as a matrix; elements, if it is a vector."""

    tensor: str
    start: int
    stop: int


Names = Mapping[str, tuple[Slice, ...]]
"""Where each weight of a decoder (a role of `squall.roles`) lies in a checkpoint."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight `[experts * rows, cols]`: slices of checkpoint tensors, one after another.

    role: what it is in the decoder, such as `layers.3.attention.q`.
    """

    slices: tuple[Slice, ...]
    rows: int
    cols: int
    experts: int = 1
    role: str = ""


@dataclass(frozen=True, slots=True)
class Vector:
    """A float32 weight `[size]`; `offset` is added to every element at load."""

    slices: tuple[Slice, ...]
    size: int
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Embed:
    """out = table[token] * scale"""

    out: Value
    table: Matrix
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RopeAngles:
    """out[:, :n] = magnitude * cos(position * frequencies), out[:, n:] = magnitude * sin(...)."""

    out: Value
    frequencies: tuple[float, ...]
    magnitude: float = 1.0


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
    """out = residual + scale * activation(x @ weight.T + bias)"""

    out: Value
    x: Value
    weight: Matrix
    bias: Vector | None = None
    activation: Activation | None = None
    scale: float = 1.0
    residual: Value | None = None


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
    """Store k and v in the cache of `layer`, then causal attention of q over the context."""

    out: Value
    q: Value
    k: Value
    v: Value
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """out = residual + scale * sum of score_e * down_e(activation(gate_e(x)) * up_e(x))

    The sum is over the `top_k` largest scores of softmax(x @ router.T), the lower index first among
    equals; `normalize` divides them by their sum.

    With a `jitter` an expert's score is instead its part of a softmax over those logits y not yet
    chosen that are near the best of them, m: (m - y) / max(|y|, m) <= 2 * jitter.
    """

    out: Value
    x: Value
    router: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    top_k: int
    activation: Activation
    normalize: bool
    jitter: float | None = None
    scale: float = 1.0
    residual: Value | None = None


@dataclass(frozen=True, slots=True)
class Add:
    """out = a + scale * b"""

    out: Value
    a: Value
    b: Value
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Softcap:
    """out = cap * tanh(x / cap)"""

    out: Value
    x: Value
    cap: float


@dataclass(frozen=True, slots=True)
class GatherRows:
    """The rows of x whose logits are wanted."""

    out: Value
    x: Value


Op = (
    Embed
    | RopeAngles
    | Normalize
    | Linear
    | GatedLinear
    | Rotate
    | Attend
    | MixtureOfExperts
    | Add
    | Softcap
    | GatherRows
)


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """KV cache geometry of one attention layer."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Program:
    """What an executor runs: `ops` in order, leaving `[outputs, vocab]` logits in `logits`."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    caches: tuple[CacheLayer, ...]
    logits: Value
    vocab: int
    context: int

    def weights(self) -> list[Matrix | Vector]:
        """Every distinct weight, in order of first use."""
        found: dict[Matrix | Vector, None] = {}
        for op in self.ops:
            for field in fields(op):
                weight = getattr(op, field.name)
                if isinstance(weight, Matrix | Vector):
                    found.setdefault(weight)
        return list(found)

    def describe(self) -> str:
        """The ops as a table: number, kind, output, inputs, weights, parameters."""
        return "\n".join(_line(number, op) for number, op in enumerate(self.ops))


def _line(number: int, op: Op) -> str:
    parts = []
    for field in fields(op):
        item = getattr(op, field.name)
        if field.name == "out" or item is None:
            continue
        match item:
            case Value():
                text = item.name
            case Matrix():
                experts = f"{item.experts}x" if item.experts > 1 else ""
                text = f"{item.slices[0].tensor}[{experts}{item.rows},{item.cols}]"
            case Vector():
                text = f"{item.slices[0].tensor}[{item.size}]"
            case tuple():
                text = f"({len(item)} values)"
            case _:
                text = f"{item:g}" if isinstance(item, float) else str(item)
        parts.append(f"{field.name}={text}")
    out = f"{op.out.name}[{op.out.rows},{op.out.width}]"
    return f"{number:4} {type(op).__name__:17} {out}  {' '.join(parts)}"


class Builder:
    """Collects ops; each method name is an op, each result the op's output value."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: list[Value] = []

    def value(self, name: str, width: int, rows: Rows = "tokens") -> Value:
        """A new symbolic value."""
        value = Value(len(self.values), name, width, rows)
        self.values.append(value)
        return value

    def emit(self, op: Op) -> Value:
        """Append an op made with a value of `value()`; returns its output."""
        self.ops.append(op)
        return op.out

    def build(
        self, logits: Value, caches: tuple[CacheLayer, ...], *, vocab: int, context: int
    ) -> Program:
        """The finished program."""
        return Program(tuple(self.ops), tuple(self.values), caches, logits, vocab, context)
