"""What executors read of a program, and how they run it as a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from squall import program as p
from squall.batch import Batch, Int32, Sequences
from squall.errors import InvalidRequest
from squall.executors import Floats, Limits, ThreadPool, thread_pool
from squall.weights import Term

NO_SEQUENCES = Sequences(
    positions=np.empty(0, np.int32),
    bounds=np.empty(0, np.int32),
    block_tables=np.empty((0, 0), np.int32),
)


class ProgramReader:
    """The part of an executor that any device has; see `Executor`."""

    settles: int | None = None
    run: Callable[..., dict[str, Floats]]

    def __init__(
        self, program: p.Program, limits: Limits, pool: ThreadPool | None, keep: Sequence[str]
    ) -> None:
        self.program = program
        self.context = program.context
        self.vocab = next((out.width for out in program.outputs if out.name == "logits"), 0)
        embeds = (op for op in program.ops if isinstance(op, p.Embed))
        self.ids = next((op.table.rows for op in embeds if op.index.name == "tokens"), 0)
        self.image_width = next((v.width for v in program.inputs if v.name == "images"), 0)
        self.blocks, self.block_size = limits.blocks, limits.block_size
        self.max_rows = limits.rows.get("tokens", 0)
        self.max_outputs = limits.rows.get("outputs", 0)
        self.pool = pool or thread_pool()
        self.threads = self.pool.threads
        self._indices, self._spaces = program.indices, program.spaces
        self.whole = any(index.name == "shared" for index in self._indices)
        self._kept = frozenset(keep)
        if missing := self._kept - {value.name for value in program.values}:
            raise InvalidRequest(f"the program has no value named {', '.join(sorted(missing))}")
        self._limits = limits

    def step(self, batch: Batch) -> Floats:
        """See `Executor`."""
        given = batch.inputs(self._indices, self.program.inputs)
        return self.run(given, batch, batch.mixtures)["logits"]

    def _given(
        self, inputs: Mapping[str, NDArray[np.generic]]
    ) -> tuple[dict[str, int], dict[str, Int32], dict[str, Floats]]:
        """Rows of each space, and the indices and values that the program asks for."""
        values = self.program.inputs
        names = [*(index.name for index in self._indices), *(value.name for value in values)]
        try:
            found = {name: inputs[name] for name in names}
        except KeyError as error:
            raise InvalidRequest(f"the run lacks {error}, which the program asks for") from None
        rows = {value.rows: len(found[value.name]) for value in values}
        rows |= {index.rows: found[index.name].shape[-1] for index in self._indices}
        indices = {index.name: cast(Int32, found[index.name]) for index in self._indices}
        return rows, indices, {value.name: cast(Floats, found[value.name]) for value in values}


# ---- adapters ----


# A number for each weight that adapters may change, the weight, and whether it is a table.
Sites = Mapping[p.Site, tuple[int, p.Matrix, bool]]


def sites_of(program: p.Program) -> Sites:
    """Where adapters may add to a program."""
    found: dict[p.Site, tuple[int, p.Matrix, bool]] = {}
    number = 0
    for op in program.ops:
        if getattr(op, "adapters", None) is None:
            continue
        for matrix in p.matrices(op):
            for expert in range(matrix.experts):
                found[matrix.role, expert] = (number, matrix, isinstance(op, p.Embed))
                number += 1
    return found


def layout_of(sites: Sites) -> int:
    """Adapters fit wherever the weights that they may change are alike."""
    return hash(tuple((number, m.rows, m.cols, table) for number, m, table in sites.values()))


def shapes_of(sites: Sites, site: p.Site, term: Term) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a term's a and b. Raises InvalidRequest for no such site, or for parts that lack."""
    if site not in sites:
        raise InvalidRequest(f"the model has no weight {site[0]} for adapters to change")
    _, matrix, table = sites[site]
    rank, rows, cols = term.rank, matrix.rows, matrix.cols
    needed = term.a if table else term.b
    lacks = needed is None or (None in (term.a, term.b) and rank != cols)
    if lacks or (term.bias is not None and term.bias.shape != (rows,)):
        raise InvalidRequest(
            f"an adapter lacks a part of what it adds to {site[0]}, or one does not fit"
        )
    return ((rows, rank), (cols, rank)) if table else ((rank, cols), (rows, rank))
