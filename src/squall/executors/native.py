"""The CPU executor: packs weights into tiles and hands the program's ops to the native core."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall import program as p
from squall.batch import Batch
from squall.checkpoints.base import Checkpoint, Pages, Tensor
from squall.errors import InvalidCheckpoint, InvalidRequest, OutOfMemory, UnsupportedModel
from squall.quant import FORMATS, FormatTotal, Plan
from squall.weights import gather

Weights = Literal["packed", "f32"]
CacheType = Literal["f16", "f32", "q8_0"]
Progress = Callable[[int, int], None]


class _Loader:
    """Weights of a checkpoint as tiles and vectors, each made once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        program: p.Program,
        pool: _native.ThreadPool,
        *,
        weights: Weights,
        plan: Plan,
        progress: Progress | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.pool = pool
        self.weights = weights
        self.plan = plan
        self._progress = progress
        self._done = 0
        self._arena = _native.Arena()
        self._tiles: dict[tuple[p.Matrix, str], list[_native.Tile]] = {}
        self._vectors: dict[p.Vector, NDArray[np.float32]] = {}
        self._inputs: dict[tuple[int, bytes], int] = {}
        self._restored = _in_disorder(program, checkpoint)
        distinct = list({self._key(weight): weight for weight in program.weights()}.values())
        self._whole = sum(self._stored(weight) for weight in distinct)
        for weight, following in zip(distinct, [*distinct[1:], None], strict=True):
            for pages in self._pages(following):
                pages.fetch()
            self._load(weight)
            for pages in self._pages(weight):
                pages.release()

    def totals(self) -> tuple[FormatTotal, ...]:
        """What the matrices became."""
        found: dict[str, list[_native.Tile]] = {}
        matrices = Counter[str]()
        for tiles in self._tiles.values():
            for tile in tiles:
                found.setdefault(tile.format, []).append(tile)
            matrices.update({tile.format for tile in tiles})
        return tuple(
            FormatTotal(
                name,
                matrices[name],
                sum(tile.rows * tile.cols for tile in tiles),
                sum(tile.nbytes for tile in tiles),
            )
            for name, tiles in found.items()
        )

    def _load(self, weight: p.Matrix | p.Vector) -> None:
        if isinstance(weight, p.Vector):
            self._vectors[weight] = self._vector(weight)
            self._advance(self._stored(weight))
            return
        tiles = self._tiles[self._matrix_key(weight)] = []
        for expert in range(weight.experts):
            tiles.append(self._pack(weight, expert))
            self._advance(self._stored(weight) // weight.experts)

    def _advance(self, stored: int) -> None:
        self._done += stored
        if self._progress is not None:
            self._progress(self._done, self._whole)

    def _key(self, weight: p.Matrix | p.Vector) -> object:
        return weight if isinstance(weight, p.Vector) else self._matrix_key(weight)

    def _matrix_key(self, weight: p.Matrix) -> tuple[p.Matrix, str]:
        """Matrices of other roles share tiles if they become the same."""
        stored = self._format(weight.slices[0].tensor)
        return replace(weight, role=""), self._target(weight, stored)

    def _target(self, weight: p.Matrix, stored: str) -> str:
        if self.weights == "f32":
            return "f32"
        return self.plan.target(weight.role, stored, weight.cols)

    def _stored(self, weight: p.Matrix | p.Vector) -> int:
        """Bytes of a weight in the checkpoint."""
        size = weight.size if isinstance(weight, p.Vector) else weight.experts * weight.rows
        tensor = self.checkpoint.tensors[weight.slices[0].tensor]
        units = tensor.rows * tensor.cols if isinstance(weight, p.Vector) else tensor.rows
        return size * tensor.nbytes // units

    def _pages(self, weight: p.Matrix | p.Vector | None) -> list[Pages]:
        slices = () if weight is None else weight.slices
        found = (self.checkpoint.tensors[part.tensor].pages for part in slices)
        return [pages for pages in found if pages is not None]

    def tile(self, weight: p.Matrix) -> _native.Tile:
        (tile,) = self.tiles(weight)
        return tile

    def tiles(self, weight: p.Matrix) -> list[_native.Tile]:
        return self._tiles[self._matrix_key(weight)]

    def vector(self, weight: p.Vector | None) -> NDArray[np.float32] | None:
        return None if weight is None else self._vectors[weight]

    def _pack(self, weight: p.Matrix, expert: int) -> _native.Tile:
        """One expert's rows of the slices (the only expert of a dense weight)."""
        first, last = expert * weight.rows, (expert + 1) * weight.rows
        rows = gather(self.checkpoint, weight.slices, first, last, weight.cols, self._read)
        target, sizes = self._target(weight, rows.format), (weight.rows, weight.cols)
        if target == rows.format:
            return _native.pack(
                rows.format, rows.data, *sizes, self.pool, self._arena, factors=rows.factors
            )
        place = self.pool, self._arena
        try:
            if rows.format in ("f32", "f16", "bf16") and rows.factors is None:
                return _native.quantize_tile(rows.format, rows.data, *sizes, target, *place)
            source = _native.pack(rows.format, rows.data, *sizes, self.pool, factors=rows.factors)
            return _native.requantize(source, target, *place)
        except ValueError as error:
            name = weight.slices[0].tensor
            raise InvalidCheckpoint(f"cannot convert tensor {name}: {error}") from None

    def _read(self, tensor: Tensor, start: int, stop: int) -> tuple[str, NDArray[np.uint8]]:
        if tensor.name not in self._restored:
            return tensor.format, tensor.row_data(start, stop)
        name = self._format(tensor.name)
        values = np.empty((stop - start, tensor.cols), FORMATS[name].layout)
        stored = FORMATS[tensor.format].dequantize(tensor.row_data(start, stop))
        values[:, tensor.order] = stored.reshape(-1, tensor.cols)
        return name, values.reshape(-1).view(np.uint8)

    def _format(self, name: str) -> str:
        if name not in self._restored:
            return self.checkpoint.tensors[name].format
        return "f32" if self.weights == "f32" else "f16"

    def input(self, executor: _native.Executor, x: p.Value, weight: p.Matrix) -> int:
        """x, with its columns in the order that the tiles of `weight` have."""
        name = weight.slices[0].tensor
        order = None if name in self._restored else self.checkpoint.tensors[name].order
        if order is None:
            return x.id
        key = (x.id, order.tobytes())
        if key not in self._inputs:
            self._inputs[key] = executor.value(x.width, x.rows == "outputs", False)
            executor.gather_columns(self._inputs[key], x.id, order.tolist())
        return self._inputs[key]

    def _vector(self, weight: p.Vector) -> NDArray[np.float32]:
        parts = [
            self.checkpoint.tensors[part.tensor].to_float32().reshape(-1)[part.start : part.stop]
            for part in weight.slices
        ]
        vector = np.ascontiguousarray(np.concatenate(parts) + np.float32(weight.offset))
        if vector.size != weight.size:
            raise InvalidCheckpoint(
                f"{weight.slices[0].tensor} has {vector.size} values, not {weight.size}"
            )
        return vector


def _in_disorder(program: p.Program, checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors whose columns go back where they belong, as f16.

    They have an order of their own, and their op multiplies its input by several weights that do
    not agree on one.
    """
    found: set[str] = set()
    for op in program.ops:
        several: list[p.Matrix] = []
        if isinstance(op, p.MixtureOfExperts):
            several = [op.router, op.gate, op.up, op.down]
        elif isinstance(op, p.GatedLinear):
            several = [op.gate, op.up]
        tensors = [checkpoint.tensors[part.tensor] for m in several for part in m.slices]
        orders = {None if t.order is None else t.order.tobytes() for t in tensors}
        if len(orders) > 1 or (isinstance(op, p.MixtureOfExperts) and orders != {None}):
            found |= {t.name for t in tensors if t.order is not None}
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Phase:
    """Where time went: a part of an op, in all steps of a profile.

    elapsed_s, waiting_s: time, and how much of it threads waited for others and for work.
    bytes: of weights and KV cache that must be read. dots, fmas: multiply-accumulates of int8 and
        of float32.
    """

    name: str
    elapsed_s: float
    waiting_s: float
    bytes: int
    dots: int
    fmas: int


def _id(value: p.Value | None) -> int | None:
    return None if value is None else value.id


@functools.singledispatch
def _lower(op: p.Op, e: _native.Executor, w: _Loader) -> None:  # noqa: ARG001
    """Hand one op to the native executor."""
    raise AssertionError(f"no lowering of {type(op).__name__}")


@_lower.register
def _(op: p.Embed, e: _native.Executor, w: _Loader) -> None:
    e.embed(op.out.id, w.tile(op.table), op.scale)


@_lower.register
def _(op: p.RopeAngles, e: _native.Executor, w: _Loader) -> None:  # noqa: ARG001
    e.rope_angles(op.out.id, list(op.frequencies), op.magnitude)


@_lower.register
def _(op: p.Normalize, e: _native.Executor, w: _Loader) -> None:
    weight, bias = w.vector(op.weight), w.vector(op.bias)
    assert weight is not None
    e.normalize(op.out.id, op.x.id, weight, bias, op.kind == "rms", op.eps, op.group)


@_lower.register
def _(op: p.Linear, e: _native.Executor, w: _Loader) -> None:
    weight, bias = w.tile(op.weight), w.vector(op.bias)
    x = w.input(e, op.x, op.weight)
    e.linear(op.out.id, x, weight, bias, op.activation, op.scale, _id(op.residual))


@_lower.register
def _(op: p.GatedLinear, e: _native.Executor, w: _Loader) -> None:
    gate, up = w.tile(op.gate), w.tile(op.up)
    biases = w.vector(op.gate_bias), w.vector(op.up_bias)
    e.gated_linear(op.out.id, w.input(e, op.x, op.gate), gate, up, *biases, op.activation)


@_lower.register
def _(op: p.Rotate, e: _native.Executor, w: _Loader) -> None:  # noqa: ARG001
    e.rotate(op.out.id, op.x.id, op.angles.id, op.heads, op.head_dim, op.interleaved)


@_lower.register
def _(op: p.Attend, e: _native.Executor, w: _Loader) -> None:  # noqa: ARG001
    e.attend(
        op.out.id, op.q.id, op.k.id, op.v.id, op.layer, op.heads, op.kv_heads, op.head_dim,
        op.scale, op.window, op.softcap,
    )  # fmt: skip


@_lower.register
def _(op: p.MixtureOfExperts, e: _native.Executor, w: _Loader) -> None:
    e.mixture_of_experts(
        op.out.id, op.x.id, w.tile(op.router), w.tiles(op.gate), w.tiles(op.up), w.tiles(op.down),
        op.top_k, op.activation, op.normalize, op.jitter, op.scale, _id(op.residual),
    )  # fmt: skip


@_lower.register
def _(op: p.Add, e: _native.Executor, w: _Loader) -> None:  # noqa: ARG001
    e.add(op.out.id, op.a.id, op.b.id, op.scale)


@_lower.register
def _(op: p.Softcap, e: _native.Executor, w: _Loader) -> None:  # noqa: ARG001
    e.softcap(op.out.id, op.x.id, op.cap)


@_lower.register
def _(op: p.GatherRows, e: _native.Executor, w: _Loader) -> None:  # noqa: ARG001
    e.gather_rows(op.out.id, op.x.id)


def default_threads() -> int:
    """As many threads as this process may use."""
    return _native.default_threads()[0]


def _isa() -> str:
    try:
        return _native.default_isa()
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


class NativeExecutor:
    """Runs a program on the CPU.

    blocks, block_size: the paged KV cache; block_size a multiple of 16.
    max_rows, max_outputs: limits of one step; its buffers are laid out once for them.
    weights: "packed" keeps the file's precision, "f32" dequantizes everything (for comparisons).
    plan: what is quantized, and to what; by default nothing.
    keep: names of values that `value` can return after a step.
    progress: called with (bytes of the checkpoint loaded, bytes in all).
    """

    def __init__(  # noqa: PLR0913
        self,
        program: p.Program,
        checkpoint: Checkpoint,
        *,
        blocks: int,
        block_size: int = 16,
        threads: int | None = None,
        weights: Weights = "packed",
        plan: Plan | None = None,
        kv_dtype: CacheType = "f16",
        max_rows: int = 512,
        max_outputs: int = 64,
        keep: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        self.program = program
        self.checkpoint = checkpoint
        self.context = program.context
        self.vocab = program.vocab
        self.blocks = blocks
        self.block_size = block_size
        self.max_rows = max_rows
        self.max_outputs = max_outputs
        self.isa = _isa()
        self.pool = _native.ThreadPool(threads or default_threads())
        self.threads = self.pool.threads
        self._weights: Weights = weights
        self._kv_dtype: CacheType = kv_dtype
        self._kept = {value.name: value.id for value in program.values if value.name in keep}
        if missing := set(keep) - self._kept.keys():
            raise InvalidRequest(f"the program has no value named {', '.join(sorted(missing))}")
        self.requantize(plan or Plan(), progress=progress)

    def requantize(self, plan: Plan, *, progress: Progress | None = None) -> None:
        """Load all weights again from the checkpoint, by another plan; the KV cache is lost.

        Until it is done the old weights are in memory too; if it fails, they stay. Not during a
        step.
        """
        if plan.quantizes and self.checkpoint.quantization:
            raise InvalidRequest(
                f"the weights are quantized already ({self.checkpoint.quantization}); "
                "quantization on the way in is for float weights"
            )
        loader = _Loader(
            self.checkpoint, self.program, self.pool,
            weights=self._weights, plan=plan, progress=progress,
        )  # fmt: skip
        try:
            self._native = self._lower(loader)
        except ValueError as error:
            raise UnsupportedModel(f"the native executor cannot run this model: {error}") from None
        except MemoryError:
            raise OutOfMemory(
                f"the KV cache ({self.blocks} blocks of {self.block_size} tokens) or the buffers "
                f"for {self.max_rows} rows do not fit in memory; choose a smaller context"
            ) from None
        self.plan = plan
        self.formats = loader.totals()
        self.weight_bytes = sum(total.nbytes for total in self.formats)
        self.kv_bytes = self._native.cache_bytes

    def _lower(self, loader: _Loader) -> _native.Executor:
        executor = _native.Executor(
            isa=self.isa, pool=self.pool, rows=self.max_rows, outputs=self.max_outputs,
            blocks=self.blocks, block_size=self.block_size, context=self.context,
            cache=self._kv_dtype,
        )  # fmt: skip
        kept = set(self._kept.values())
        for value in self.program.values:
            number = executor.value(value.width, value.rows == "outputs", value.id in kept)
            assert number == value.id
        for cache in self.program.caches:
            executor.cache(cache.kv_heads, cache.head_dim)
        for op in self.program.ops:
            _lower(op, executor, loader)
        executor.plan(self.program.logits.id)
        return executor

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Logits [outputs, vocab] of one step; its K and V are in the cache afterwards."""
        logits = np.empty((len(batch.outputs), self.program.vocab), np.float32)
        try:
            self._native.step(
                batch.tokens, batch.positions, batch.slots, batch.bounds, batch.block_tables,
                batch.outputs, logits,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        return logits

    def profile(self, run: Callable[[], None]) -> list[Phase]:
        """Where the time of the steps of `run` goes, in the order of the program."""
        self._native.profile(True)
        try:
            run()
        finally:
            self._native.profile(False)
        return [Phase(*entry) for entry in self._native.profiled()]

    def value(self, name: str) -> NDArray[np.float32]:
        """A kept value of the last step, float32 [rows, width]."""
        return self._native.read(self._kept[name])
