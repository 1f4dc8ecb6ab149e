"""The networks of a model that makes pictures: opened for the rows of a run, and freed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall import executors
from squall.executors import Executor, Limits, Placement, ThreadPool
from squall.executors.memory import activations
from squall.program import Matrix, Program
from squall.quant import FormatTotal
from squall.weights import MERGEABLE, Progress, Weight, WeightStore

Floats = NDArray[np.float32]
Inputs = Mapping[str, NDArray[np.generic]]
Run = Callable[[Inputs], Mapping[str, Floats]]
Rows = Mapping[str, int]


class Network:
    """A network, whose weights are in memory only if it is loaded, or while it is open.

    by_layer: each layer's weights are read when it runs, and freed after it.
    loaded: they stay.
    """

    def __init__(
        self, program: Program, store: WeightStore, placement: Placement, pool: ThreadPool, *,
        by_layer: bool = False,
    ) -> None:  # fmt: skip
        self.program, self.loaded = program, False
        self._store, self._placement, self._pool = store, placement, pool
        self._by_layer = by_layer
        self._stages = program.stages(*program.layers) if by_layer else [program]
        self._runs: dict[tuple[int, ...], int] = {}
        # What is still to be read after each stage.
        self._needed = [
            {value.name for later in self._stages[at:] for value in later.inputs}
            | {index.name for index in program.indices}
            | {value.name for value in program.outputs}
            for at in range(1, len(self._stages) + 1)
        ]

    @property
    def stored_bytes(self) -> int:
        """Of all weights, in their files."""
        return sum(map(self._store.nbytes, self._distinct(self.program)))

    @cached_property
    def weight_bytes(self) -> int:
        """Of the weights that are in memory together."""
        return max(sum(map(self._store.becomes, self._distinct(part))) for part in self._stages)

    @cached_property
    def formats(self) -> list[FormatTotal]:
        """What each matrix becomes, one by one."""
        return [
            FormatTotal(self._store.format(w), 1, w.rows * w.cols, self._store.becomes(w))
            for w in self._distinct(self.program)
            if isinstance(w, Matrix)
        ]

    def needs(self, rows: Rows, *, loaded: bool = False) -> int:
        """About how much more memory a run takes. loaded: if it were so."""
        integers = any(total.format not in MERGEABLE for total in self.formats)
        if (key := tuple(rows.values())) not in self._runs:
            self._runs[key] = max(
                activations(stage, rows, integers=integers) for stage in self._stages
            )
        runs = self._runs[key]
        return runs if loaded or self.loaded else runs + self.weight_bytes

    def load(self, progress: Progress | None) -> None:
        """Keep the weights in memory, which takes no more with rows than what these need."""
        rows = dict.fromkeys(self.program.spaces, 1)
        self._open(self.program, rows, progress)
        self.loaded = True

    def free(self) -> None:
        self._store.layouts.clear()
        self.loaded = False

    def run(self, inputs: Inputs, between: Callable[[], None]) -> Floats:
        """The only output of a network that runs once. between: called before, and as `opened`."""
        between()
        with self.opened(inputs, between) as run:
            (found,) = run(inputs).values()
        return found

    @contextmanager
    def opened(self, inputs: Inputs, between: Callable[[], None]) -> Iterator[Run]:
        """What runs it on inputs with as many rows as these. between: called between layers."""
        rows = {value.rows: len(inputs[value.name]) for value in self.program.inputs}
        rows |= {index.rows: inputs[index.name].shape[-1] for index in self.program.indices}
        whole = None if self._by_layer else self._open(self.program, rows)

        def run(inputs: Inputs) -> Mapping[str, Floats]:
            if whole is not None:
                return whole.run(inputs, patient=True)
            values: dict[str, NDArray[Any]] = dict(inputs)
            for stage, needed in zip(self._stages, self._needed, strict=True):
                between()
                values |= self._open(stage, rows).run(values, patient=True)
                self._store.layouts.clear()
                values = {name: value for name, value in values.items() if name in needed}
            return {value.name: values[value.name] for value in self.program.outputs}

        try:
            yield run
        finally:
            whole = None
            if not self.loaded:
                self.free()

    def _distinct(self, program: Program) -> list[Weight]:
        return list({self._store.key(weight): weight for weight in program.weights()}.values())

    def _open(self, program: Program, rows: Rows, progress: Progress | None = None) -> Executor:
        return executors.open(
            program, self._store, Limits(rows=rows), placement=self._placement, pool=self._pool,
            progress=progress,
        )  # fmt: skip
