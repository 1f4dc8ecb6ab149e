"""Memory: what programs take of it, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from squall.program import Attend, Program, Value, op_weights, reads

if TYPE_CHECKING:
    from squall.weights import WeightStore

KV_BITS = {"f16": 16.0, "f32": 32.0, "q8_0": 9.0}


@dataclass(frozen=True, slots=True)
class Load:
    """What a device has to hold: layers, bytes of weights, bytes of KV cache for each token.

    free: bytes that there are for them; None: nobody knows.
    """

    device: str
    layers: int
    weights: int
    kv: int
    free: int | None

    @property
    def room(self) -> int | None:
        """Tokens of KV cache that fit beside the weights; None where nobody knows."""
        if self.free is None or not self.kv:
            return None
        return max(self.free - self.weights, 0) // self.kv


@dataclass(frozen=True, slots=True, eq=False)
class Sizes:
    """What a program takes by layer; what is before the first and after the last is part of them.

    weights: bytes by the key that a weight has in its store. kv: bytes for each token.
    """

    weights: Sequence[Mapping[object, int]]
    kv: Sequence[int]

    @classmethod
    def of(
        cls, program: Program, store: WeightStore, kv_dtype: str, *, caches: int = 1,
        whole: Program | None = None,
    ) -> Sizes:  # fmt: skip
        """caches: how many a layer has. What the checkpoint holds beside `whole`, of which the
        program may be a part, is with the first layer.
        """
        layers = {name: number for number, name in enumerate(program.layers, start=1)}
        last = max(len(layers) - 1, 0)
        weights: list[dict[object, int]] = [{} for _ in range(last + 1)]
        kv, number = [0] * (last + 1), 0
        for op in program.ops:
            weights[number] |= {store.key(w): store.becomes(w) for w in op_weights(op)}
            if isinstance(op, Attend) and op.cache is not None:
                cache = program.caches[op.cache]
                values = 2 * caches * cache.kv_heads * cache.head_dim
                kv[number] += round(KV_BITS[kv_dtype] * values / 8)
            number = min(layers.get(op.out.name, number), last)
        stored = sum(map(store.nbytes, (whole or program).weights()))
        weights[0][None] = max(store.checkpoints[""].size_bytes - stored, 0)
        return cls(weights, kv)

    def bytes(self, tokens: int, first: int = 0, stop: int | None = None) -> int:
        """Of some layers, with KV cache for so many tokens."""
        return self._weights(first, stop) + tokens * sum(self.kv[first:stop])

    def loads(
        self, spread: Iterable[tuple[str, int]], free: Callable[[str], int | None]
    ) -> list[Load]:
        """What devices with so many layers each have to hold."""
        found, first = [], 0
        for device, count in spread:
            stop = first + count
            own = (self._weights(first, stop), sum(self.kv[first:stop]))
            found.append(Load(device, count, *own, free(device)))
            first = stop
        return found

    def _weights(self, first: int, stop: int | None) -> int:
        together: dict[object, int] = {}
        for layer in self.weights[first:stop]:
            together |= layer
        return sum(together.values())


def by_memory(loads: Iterable[Load]) -> list[Load]:
    """One for each memory, which PyTorch on the CPU shares with the native executor."""
    found: dict[str, Load] = {}
    for load in loads:
        name = "cpu" if load.device == "torch" else load.device
        before = found.get(name, Load(name, 0, 0, 0, load.free))
        found[name] = replace(
            before, layers=before.layers + load.layers, weights=before.weights + load.weights,
            kv=before.kv + load.kv,
        )  # fmt: skip
    return list(found.values())


def activations(program: Program, rows: Mapping[str, int], *, integers: bool) -> int:
    """About how many bytes a run takes beside weights and caches. rows: of each space.

    integers: linears multiply integers, which are kept beside the floats they were made of.
    """

    def size(*values: Value) -> int:
        return sum(rows[v.rows] * v.width for v in values) * (21 if integers else 16) // 4

    last: dict[Value, int] = {value: len(program.ops) for value in program.outputs}
    for number, op in reversed(list(enumerate(program.ops))):
        for value in reads(op):
            last.setdefault(value, number)
    given = sum(4 * rows[index.rows] * index.axes for index in program.indices)
    most, keys, held = 0, 0, given + 2 * size(*program.inputs)
    for number, op in enumerate(program.ops):
        held += size(op.out)
        if isinstance(op, Attend) and op.cache is None:
            keys = max(keys, size(op.k, op.v))
        most = max(most, held)
        held -= size(*(value for value in set(reads(op)) if last[value] == number))
    return most + keys + size(*program.outputs)
