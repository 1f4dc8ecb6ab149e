"""Matrices of a checkpoint in the number formats of a plan, quantized in runs of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from squall import _native
from squall.checkpoints.base import Checkpoint
from squall.errors import InvalidCheckpoint
from squall.program import Slice
from squall.quant import FORMATS, Plan
from squall.recipes import Recipe
from squall.weights import Progress, Stored, gather, values

Importance = Mapping[str, NDArray[np.float32]]
"""Name in a GGUF file, without `.weight` -> weights of its columns' errors, [experts, cols]."""

_RUN_VALUES = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Stored of a checkpoint, `experts` times `rows`, and what they are to become.

    order: where the rows come from, if they are written in another order.
    importance: [experts, cols], for the search of the codes.
    """

    name: str
    slices: tuple[Slice, ...]
    first: int
    rows: int
    cols: int
    format: str
    experts: int = 1
    order: NDArray[np.intp] | None = None
    importance: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        return self.experts * self.rows * FORMATS[self.format].row_bytes(self.cols)


@dataclass(frozen=True, slots=True)
class Written:
    """A matrix as it was written. rmse: of its values, relative to their root mean square."""

    name: str
    source: str
    format: str
    shape: tuple[int, int]
    nbytes: int
    rmse: float


@dataclass(slots=True, eq=False)
class Quantizer:
    """Converts matrices, and keeps account of them."""

    checkpoint: Checkpoint
    pool: _native.ThreadPool
    whole: int = 0
    progress: Progress | None = None
    written: list[Written] = field(default_factory=list)
    _done: int = 0

    def chunks(self, matrix: Matrix) -> Iterator[NDArray[np.uint8]]:
        """The bytes of a matrix in its format, as files have them."""
        error = np.zeros(2)
        source = ""
        for expert in range(matrix.experts):
            rows = self.rows(matrix, expert)
            source = rows.format
            for start, stop in self._runs(matrix):
                yield self._convert(matrix, expert, _part(rows, matrix, start, stop), error)
            self.advance(len(rows.data))
        self.note(matrix, source, error)

    def rows(self, matrix: Matrix, expert: int = 0) -> Stored:
        """The rows of an expert as they are stored, in the order in which they are written."""
        first = matrix.first + expert * matrix.rows
        last, tensors = first + matrix.rows, self.checkpoint.tensors
        found = gather(lambda s: tensors[s.tensor], matrix.slices, first, last, matrix.cols)
        if matrix.order is None:
            return found
        data = found.data.reshape(matrix.rows, -1)[matrix.order].reshape(-1)
        return Stored(
            found.format, data, None if found.factors is None else found.factors[matrix.order]
        )

    def _runs(self, matrix: Matrix) -> Iterator[tuple[int, int]]:
        run = max(_RUN_VALUES // matrix.cols, 1)
        if matrix.format.startswith("hqq"):  # which is fitted to the whole matrix
            run = matrix.rows
        for start in range(0, matrix.rows, run):
            yield start, min(start + run, matrix.rows)

    def _convert(
        self, matrix: Matrix, expert: int, rows: Stored, error: NDArray[np.float64]
    ) -> NDArray[np.uint8]:
        if rows.format == matrix.format and rows.factors is None:
            return rows.data
        found = values(rows, matrix.cols)
        importance = None if matrix.importance is None else matrix.importance[expert]
        data = self.quantize(matrix, found, importance)
        count_error(error, found, FORMATS[matrix.format].dequantize(data))
        return data

    def quantize(
        self,
        matrix: Matrix,
        found: NDArray[np.float32],
        importance: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """Values [rows, cols] as blocks."""
        format = FORMATS[matrix.format]
        if format.encode is not None:
            return format.quantize(found.reshape(-1))
        try:
            return _native.quantize(format.name, found, importance, self.pool)[0]
        except ValueError as error:
            raise InvalidCheckpoint(f"cannot quantize {matrix.name}: {error}") from None

    def note(self, matrix: Matrix, source: str, error: NDArray[np.float64]) -> None:
        """Keep what became of a matrix; error: the sums of squares of errors and of values."""
        rmse = float(np.sqrt(error[0] / error[1])) if error[1] > 0 else 0.0
        shape = (matrix.experts * matrix.rows, matrix.cols)
        self.written.append(Written(matrix.name, source, matrix.format, shape, matrix.nbytes, rmse))

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self.progress is not None:
            self.progress(min(self._done, self.whole), self.whole)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A model that is to be written, and by what plan."""

    quantizer: Quantizer
    recipe: Recipe
    plan: Plan
    importance: Importance


def count_error(
    error: NDArray[np.float64], exact: NDArray[np.float32], made: NDArray[np.float32]
) -> None:
    """Add the squares of the errors and of the values."""
    off = exact.reshape(-1) - made.reshape(-1)
    error += np.array([np.vdot(off, off), np.vdot(exact, exact)], np.float64)


def _part(rows: Stored, matrix: Matrix, start: int, stop: int) -> Stored:
    row_bytes = len(rows.data) // matrix.rows
    factors = None if rows.factors is None else rows.factors[start:stop]
    return Stored(rows.format, rows.data[start * row_bytes : stop * row_bytes], factors)
