"""Executors in a row: stages of one program, each on a device of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from squall import executors
from squall.batch import Mixture, Sequences
from squall.executors import Adapter, Executor, Floats, Memory, Order, Phase
from squall.executors.base import sites_of, summed
from squall.executors.devices import Stage
from squall.program import Site
from squall.weights import Progress, Term, WeightStore


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """An adapter or a memory, stage by stage; counts: of memories, how many each stage has."""

    parts: Sequence[Any]
    counts: Sequence[int] = ()
    rows: int = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts if part is not None)

    def write(self, first: int, keys: Sequence[Floats], values: Sequence[Floats]) -> None:
        at = 0
        for part, count in zip(self.parts, self.counts, strict=True):
            if part is not None:
                part.write(first, keys[at : at + count], values[at : at + count])
            at += count


class StagedExecutor(Executor):
    """Runs a program's layers where the placement says."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        layers = self.program.layers
        self._spread = self.placement.spread(len(layers))
        ends = accumulate(count for _, count in self._spread[:-1])
        self._programs = self.program.stages(*(layers[end - 1] for end in ends))
        values = [{value.name for value in part.values} for part in self._programs]
        self._keeper = {
            name: next(i for i, names in enumerate(values) if name in names) for name in self._kept
        }
        parts = [sites_of(part) for part in self._programs]
        self._stage_of = {site: number for number, sites in enumerate(parts) for site in sites}

    def _load(self, store: WeightStore, progress: Progress | None) -> None:
        sizes = [sum(map(store.nbytes, part.weights())) for part in self._programs]
        stages = [
            executors.open(
                part, store, self._limits, pool=self.pool,
                placement=replace(self.placement, stages=(Stage(device),)),
                keep=[name for name, keeper in self._keeper.items() if keeper == number],
                progress=progress and partial(_told, progress, sum(sizes[:number]), sum(sizes)),
            )
            for number, (part, (device, _)) in enumerate(
                zip(self._programs, self._spread, strict=True)
            )
        ]  # fmt: skip
        self._stages = stages
        self.formats = summed(total for stage in stages for total in stage.formats)
        self.kv_bytes = sum(stage.kv_bytes for stage in stages)
        counts = (count for _, count in self._spread)
        self.isa = ", then ".join(
            f"{count} layers on {stage.isa}" for count, stage in zip(counts, stages, strict=True)
        )

    def run(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        sequences: Sequences | None = None,
        mixtures: Sequence[Mixture] = (),
        **how: bool,
    ) -> dict[str, Floats]:
        made: dict[str, NDArray[np.generic]] = dict(inputs)
        outputs: dict[str, Floats] = {}
        for number, stage in enumerate(self._stages):
            at, adapters = _recalling(sequences, number), _adapted(mixtures, number)
            found = stage.run(made, at, adapters, **how)
            made |= found
            outputs |= found
        return {value.name: outputs[value.name] for value in self.program.outputs}

    def adapter(self, terms: Mapping[Site, Term]) -> Adapter:
        parts: list[dict[Site, Term]] = [{} for _ in self._stages]
        for site, term in terms.items():
            parts[self._stage_of.get(site, 0)][site] = term  # an unknown one is refused there
        return _Parts([s.adapter(part) for s, part in zip(self._stages, parts, strict=True)])

    def memory(self, rows: int) -> Memory:
        counts = [len(part.memories) for part in self._programs]
        made = zip(self._stages, counts, strict=True)
        return _Parts([stage.memory(rows) if n else None for stage, n in made], counts, rows)

    def profile(self, act: Callable[[], None]) -> list[Phase]:
        found: list[Phase] = []
        for stage in self._stages:
            act = partial(lambda profile, act: found.extend(profile(act)), stage.profile, act)
        act()
        return found

    def value(self, name: str) -> Floats:
        return self._stages[self._keeper[name]].value(name)


def _told(progress: Progress, before: int, whole: int, done: int, _: int) -> None:
    progress(min(before + done, whole), whole)


def _recalling(sequences: Sequences | None, number: int) -> Sequences | None:
    """The sequences with what a stage has of their memories."""
    if sequences is None or not sequences.memories:
        return sequences
    # A stage refuses what was made for another model.
    parts = [m.parts[number] if isinstance(m, _Parts) else m for m in sequences.memories]
    return replace(sequences, memories=tuple(parts) if any(parts) else ())


def _adapted(mixtures: Sequence[Mixture], number: int) -> list[Mixture]:
    """The mixtures of what a stage has of their adapters."""
    return [
        tuple((a.parts[number] if isinstance(a, _Parts) else a, weight) for a, weight in mixture)
        for mixture in mixtures
    ]
