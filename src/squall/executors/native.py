"""The CPU executor: packs weights into tiles and hands the program's ops to the native core."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall import program as p
from squall.batch import Mixture, Sequences
from squall.errors import InvalidCheckpoint, InvalidRequest, OutOfMemory, UnsupportedModel
from squall.executors import Adapter, Executor, Floats, Memory, Order, Phase
from squall.executors.base import NO_SEQUENCES, Laid, Sites, layout_of, shapes_of, sites_of
from squall.weights import Progress, Term, WeightStore


class Tiles(Laid[_native.Tile, Floats]):
    """An expert a tile."""

    def __init__(self, store: WeightStore) -> None:
        super().__init__(store)
        self._arena = _native.Arena()

    def _matrix(self, weight: p.Matrix, pool: _native.ThreadPool) -> list[_native.Tile]:
        return [self._pack(weight, expert, pool) for expert in range(weight.experts)]

    def _vector(self, weight: p.Vector) -> Floats:
        return self._store.vector(weight)

    def _pack(self, weight: p.Matrix, expert: int, pool: _native.ThreadPool) -> _native.Tile:
        rows = self._store.rows(weight, expert)
        target = self._store.target(weight, rows.format)
        sizes, place = (weight.rows, weight.cols), (pool, self._arena)
        if target == rows.format:
            return _native.pack(rows.format, rows.data, *sizes, *place, factors=rows.factors)
        try:
            if rows.format in ("f32", "f16", "bf16") and rows.factors is None:
                return _native.quantize_tile(rows.format, rows.data, *sizes, target, *place)
            source = _native.pack(rows.format, rows.data, *sizes, pool, factors=rows.factors)
            return _native.requantize(source, target, *place)
        except ValueError as error:
            name = weight.slices[0].tensor
            raise InvalidCheckpoint(f"cannot convert tensor {name}: {error}") from None


def default_isa() -> str:
    """The best of this machine, or the one that is asked for."""
    try:
        return _native.default_isa()
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


class NativeExecutor(Executor):
    """Runs a program on the CPU."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        self.isa = default_isa()

    def _load(self, store: WeightStore, progress: Progress | None) -> None:
        program, tiles = store.arranged(self.program), Tiles.of(store)
        weights = program.weights()
        tiles.load(weights, self.pool, progress)
        try:
            self._native = self._lower(program, tiles)
        except ValueError as error:
            raise UnsupportedModel(f"the native executor cannot run this model: {error}") from None
        except MemoryError:
            raise OutOfMemory(
                f"the KV cache ({self.blocks} blocks of {self.block_size} tokens) or the buffers "
                f"for {max(self._limits.rows.values())} rows do not fit in memory; "
                "choose a smaller context"
            ) from None
        self.formats = tiles.totals(weights)
        self.kv_bytes = self._native.cache_bytes

    def _lower(self, program: p.Program, tiles: Tiles) -> _native.Executor:
        spaces, limits = self._spaces, self._limits
        executor = _native.Executor(
            isa=self.isa, pool=self.pool, 
            rows=[limits.rows.get(space, self.max_rows) for space in spaces],
            blocks=limits.blocks, block_size=limits.block_size, context=program.context,
            # Without caches keys and values are kept for a moment only.
            cache=limits.kv_dtype if program.caches or program.memories else "f32",
        )  # fmt: skip
        ids: dict[p.Value | p.Index | None, int] = {}
        for value in program.values:
            space, kept = spaces.index(value.rows), value.name in self._kept
            ids[value] = executor.value(value.width, space, kept)
        for index in self._indices:
            ids[index] = executor.index(spaces.index(index.rows), index.axes)
        for cache in program.caches:
            executor.cache(cache.kv_heads, cache.head_dim)
        for memory in program.memories:
            executor.memory(memory.kv_heads, memory.head_dim)
        for value in program.inputs:
            executor.input(ids[value])
        self._sites = sites_of(program)
        lowering = _Lowering(executor, tiles, ids, self._sites)
        for op in program.ops:
            _lower(op, lowering)
        self._layout = layout_of(self._sites)
        executor.plan([ids[value] for value in program.outputs], self._layout)
        self._ids = {value.name: ids[value] for value in program.values}
        return executor

    def adapter(self, terms: Mapping[p.Site, Term]) -> Adapter:
        stored = [part for term in terms.values() for part in (term.a, term.b) if part is not None]
        made = _native.Adapter(self._layout)
        arena = _native.Arena(sum(part.data.nbytes for part in stored) + 8192 * len(stored))
        for site, term in terms.items():
            shapes = shapes_of(self._sites, site, term)
            try:
                a, b = (
                    None
                    if part is None
                    else _native.pack(part.format, part.data, *shape, arena=arena)
                    for part, shape in zip((term.a, term.b), shapes, strict=True)
                )
                made.add(self._sites[site][0], a, b, term.scale, term.bias)
            except ValueError as error:
                raise InvalidRequest(f"an adapter does not fit {site[0]}: {error}") from None
        return made

    def run(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        sequences: Sequences | None = None,
        mixtures: Sequence[Mixture] = (),
        *,
        patient: bool = False,
    ) -> dict[str, Floats]:
        """See `Executor`. Raises InvalidRequest for what is missing, misshapen or out of range."""
        rows, indices, values = self._given(inputs)
        program, at = self.program, sequences or NO_SEQUENCES
        try:
            outputs = {
                v.name: np.empty((rows[v.rows], v.width), np.float32) for v in program.outputs
            }
            self._native.run(
                [rows[space] for space in self._spaces],
                list(indices.values()), list(values.values()),
                at.positions, at.bounds, at.block_tables, list(outputs.values()),
                mixtures,  # type: ignore[arg-type]  # of adapters made here
                at.memories,  # type: ignore[arg-type]  # made here
                patient,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise InvalidRequest(str(error)) from None
        return outputs

    def memory(self, rows: int) -> Memory:
        try:
            return self._native.remember(rows)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(str(error)) from None
        except MemoryError:
            raise OutOfMemory(f"{rows} rows of an image do not fit in memory") from None

    def profile(self, act: Callable[[], None]) -> list[Phase]:
        self._native.profile(True)
        try:
            act()
        finally:
            self._native.profile(False)
        return [Phase(*entry) for entry in self._native.profiled()]

    def value(self, name: str) -> Floats:
        return self._native.read(self._ids[name])


# ---- ops ----


_Given = tuple[int, int, int | None, tuple[int, ...], int] | None


@dataclass(frozen=True, slots=True)
class _Lowering:
    """What ops become calls of, the weights, and the core's numbers of values and indices."""

    core: _native.Executor
    weights: Tiles
    ids: Mapping[p.Value | p.Index | None, int]
    sites: Sites

    def adapters(self, op: p.Embed | p.Linear | p.GatedLinear | p.MixtureOfExperts) -> _Given:
        """What rows add to the weights of an op, as the core is told."""
        if (a := op.adapters) is None:
            return None
        scalings, first = self.ids.get(a.scalings), self.sites[p.sites(op)[0]][0]
        return self.ids[a.x], self.ids[a.mixture], scalings, a.columns, first

    def of(self, item: object) -> Any:
        """A field of an op, as the core takes it."""
        match item:
            case p.Value() | p.Index():
                return self.ids[item]
            case p.Matrix():
                return self.weights.matrices(item)[0]
            case p.Vector():
                return self.weights.vector(item)
        return item


def _lower(op: p.Op, to: _Lowering) -> None:
    """Hand one op to the core, which has most of them, and their fields, by the same names."""
    given = {field.name: to.of(getattr(op, field.name)) for field in fields(op)}
    match op:
        case p.Embed() | p.Linear() | p.GatedLinear():
            given["adapters"] = to.adapters(op)
        case p.RopeAngles():
            given["axes"] = op.axes or (0,) * len(op.frequencies)
        case p.Normalize():
            given["rms"] = given.pop("kind") == "rms"
        case p.Recall():
            given |= {"spans": given.pop("seen"), "cache": given.pop("memory")}
            given |= dict.fromkeys(("k", "v", "window", "softcap"))
        case p.MixtureOfExperts():
            for name in ("gate", "up", "down"):
                experts = getattr(op, name)
                given[name] = [] if experts is None else to.weights.matrices(experts)
            biases = ("router_bias", "gate_bias", "up_bias", "down_bias")
            given |= {"biases": [given.pop(bias) for bias in biases], "adapters": to.adapters(op)}
        case p.GatherColumns():
            given["order"] = np.frombuffer(op.order, "<u4")
    name = "attend" if isinstance(op, p.Recall) else p.name_of(op)
    getattr(to.core, name)(**given)
