"""Sequences that attend, step by step, in NumPy's reference and on PyTorch's devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from native_executor import in_memory
from reference_executor import ReferenceExecutor
from spans import Spans
from squall.batch import Sequences
from squall.gpu import attention
from squall.program import Attend, Builder, CacheLayer, Index, Program, Recall

Array = NDArray[np.float32]
Chunk = tuple[int, int, int]
"""(sequence, first position, one past the last)."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention's shape."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    window: int | None = None
    softcap: float | None = None
    cached: bool = True
    block: int = 16

    def program(self, keys: str = "tokens") -> Program:
        b = Builder()
        q = b.value("q", self.heads * self.dim)
        k, v = (b.value(name, self.kv_heads * self.dim, keys) for name in "kv")
        op = Attend(
            b.value("out", q.width), q, k, v, Index("spans", axes=2), 0 if self.cached else None,
            self.heads, self.kv_heads, self.dim, self.dim**-0.5, self.window, self.softcap,
        )  # fmt: skip
        caches = (CacheLayer(self.kv_heads, self.dim),) if self.cached else ()
        return b.build(b.emit(op), inputs=(q, k, v), caches=caches, context=1 << 16)

    def recalling(self) -> Program:
        b = Builder()
        q = b.value("q", self.heads * self.dim)
        op = Recall(
            b.value("out", q.width), q, Index("seen", axes=2), 0,
            self.heads, self.kv_heads, self.dim, self.dim**-0.5,
        )  # fmt: skip
        return b.build(b.emit(op), inputs=(q,), memories=(CacheLayer(self.kv_heads, self.dim),))

    def drawn(self, rng: np.random.Generator, rows: int, keys: int | None = None) -> list[Array]:
        """q, k and v."""
        width, keys = self.kv_heads * self.dim, rows if keys is None else keys
        sizes = [(rows, self.heads * self.dim), (keys, width), (keys, width)]
        return [rng.standard_normal(size, np.float32) for size in sizes]


class Texts:
    """Sequences of some lengths, their q, k, v and spans drawn, and blocks all over the cache."""

    def __init__(self, rng: np.random.Generator, heads: Heads, lengths: Sequence[int]) -> None:
        self.heads, self.lengths = heads, lengths
        self.drawn = [heads.drawn(rng, length) for length in lengths]
        self.spans = [causal(length) for length in lengths]
        needed = [-(-length // heads.block) for length in lengths]
        self.blocks = sum(needed) + 3
        order = rng.permutation(self.blocks).astype(np.int32)
        self.tables = np.zeros((len(lengths), max(needed)), np.int32)
        for table, count, end in zip(self.tables, needed, np.cumsum(needed), strict=True):
            table[:count] = order[end - count : end]

    def step(self, chunks: Sequence[Chunk]) -> tuple[list[Array], Spans, Sequences]:
        """These rows of these sequences: q, k and v, spans, and where they stand."""
        parts = [[x[a:b] for x in self.drawn[s]] for s, a, b in chunks]
        sequences = Sequences(
            positions=np.concatenate([np.arange(a, b) for _, a, b in chunks]).astype(np.int32),
            bounds=np.cumsum([0, *(b - a for _, a, b in chunks)]).astype(np.int32),
            block_tables=self.tables[[s for s, _, _ in chunks]],
        )
        spans = np.concatenate([self.spans[s][:, a:b] for s, a, b in chunks], axis=1)
        return [np.concatenate(x) for x in zip(*parts, strict=True)], spans, sequences

    def run(self, steps: Sequence[Sequence[Chunk]], run: Callable[..., Array]) -> list[Array]:
        """What rows get in these steps, by sequence."""
        out = [np.full_like(q, np.nan) for q, _, _ in self.drawn]
        for chunks in steps:
            found = run(*self.step(chunks))
            at = 0
            for s, a, b in chunks:
                out[s][a:b] = found[at : at + b - a]
                at += b - a
        return out

    def reference(self, steps: Sequence[Sequence[Chunk]]) -> list[Array]:
        program = self.heads.program()
        executor = ReferenceExecutor(
            program, in_memory({}), blocks=self.blocks, block_size=self.heads.block
        )

        def run(given: list[Array], spans: Spans, sequences: Sequences) -> Array:
            inputs: dict[str, Any] = dict(zip("qkv", given, strict=True))
            return executor.run(inputs | {"spans": spans}, sequences)["out"]

        return self.run(steps, run)

    def ours(
        self,
        steps: Sequence[Sequence[Chunk]],
        dtype: torch.dtype = torch.float32,
        *,
        exact: bool,
        spare: int = 0,
        device: torch.device = CPU,
    ) -> list[Array]:
        """spare: rows of padding."""
        heads = self.heads
        op, layer = heads.program().ops[0], CacheLayer(heads.kv_heads, heads.dim)
        cache = attention.Cache(self.blocks * heads.block, layer, dtype, device)
        assert isinstance(op, Attend)

        def run(given: list[Array], spans: Spans, sequences: Sequences) -> Array:
            arrays, shape = attention.layout(sequences, heads.block, rows=len(given[0]) + spare)
            tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            placed = attention.Rows(tensors, shape, heads.block)
            padded = [np.pad(x, ((0, shape.rows - len(x)), (0, 0))) for x in given]
            q, k, v = (torch.from_numpy(x).to(device, dtype) for x in padded)
            seen = np.pad(spans, ((0, 0), (0, shape.rows - len(given[0]))), constant_values=1)
            attention.store(cache, k, v, placed)
            where = torch.from_numpy(seen).to(device)
            out = attention.attend(op, q, cache, where, placed, exact=exact).float().cpu().numpy()
            assert np.isfinite(out).all()
            return out[: len(given[0])]

        return self.run(steps, run)


def causal(rows: int) -> Spans:
    return np.stack([np.zeros(rows), np.arange(1, rows + 1)]).astype(np.int32)


def chunked(start: int, stop: int, size: int) -> list[Chunk]:
    return [(0, at, min(at + size, stop)) for at in range(start, stop, size)]


def here(heads: Heads, given: list[Array], spans: Spans) -> Array:
    """What the reference says of rows that attend to k and v of the run."""
    executor = ReferenceExecutor(heads.program("patches"), in_memory({}), blocks=1)
    inputs: dict[str, Any] = dict(zip("qkv", given, strict=True))
    return executor.run(inputs | {"spans": spans})["out"]
