"""What adapters add to ops, against NumPy, on every instruction set; and never to other rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from squall import _native, executors
from squall.adapters.edits import adaptable
from squall.batch import Mixture
from squall.checkpoints.base import ByteTensor, Checkpoint
from squall.errors import InvalidRequest
from squall.executors import Executor, Limits
from squall.program import (
    Builder,
    Embed,
    GatedLinear,
    GatherRows,
    Index,
    Linear,
    Matrix,
    MixtureOfExperts,
    Program,
    Site,
    Slice,
    sites,
)
from squall.weights import Stored, Term, WeightStore

Array = NDArray[np.float32]
ROWS = (1, 2, 3, 4, 5, 8, 23, 512)
WIDTH, WIDE, VOCAB, EXPERTS, TOP_K = 37, 67, 29, 3, 2
SIZES = {
    "table": (VOCAB, WIDTH), "linear": (WIDE, WIDTH), "gate": (WIDE, WIDTH), "up": (WIDE, WIDTH),
    "router": (EXPERTS, WIDTH), "moe.gate": (EXPERTS * WIDE, WIDTH),
    "moe.up": (EXPERTS * WIDE, WIDTH), "moe.down": (EXPERTS * WIDTH, WIDE),
}  # fmt: skip
OUTPUTS = ("embed", "linear", "gated", "moe")


def matrix(role: str) -> Matrix:
    rows, cols = SIZES[role]
    experts = EXPERTS if role.startswith("moe.") else 1
    return Matrix((Slice(role, 0, rows),), rows // experts, cols, experts, role)


def program() -> Program:
    """An op of each kind, each of the embedded ids."""
    b = Builder()
    x = b.emit(Embed(b.value("embed", WIDTH), Index("ids"), matrix("table"), 0.5))
    chosen = b.emit(GatherRows(b.value("chosen", WIDTH, "outputs"), x, Index("outputs", "outputs")))
    linear = b.emit(
        Linear(b.value("linear", WIDE, "outputs"), chosen, matrix("linear"), None, "silu", 0.7)
    )
    gated = b.emit(GatedLinear(b.value("gated", WIDE), x, matrix("gate"), matrix("up"), "gelu"))
    parts = (matrix(f"moe.{part}") for part in ("gate", "up", "down"))
    moe = MixtureOfExperts(
        b.value("moe", WIDTH), x, matrix("router"), *parts, TOP_K, "silu", True, residual=x
    )
    return b.build(x, linear, gated, b.emit(moe))


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    rng = np.random.default_rng()
    return {name: rng.normal(0, 0.3, size).astype(np.float32) for name, size in SIZES.items()}


def opened(weights: dict[str, Array], edited: Program) -> Executor:
    tensors = {
        name: ByteTensor(name, "f32", w.shape, w.reshape(-1).view(np.uint8))
        for name, w in weights.items()
    }
    checkpoint = Checkpoint(Path(), {}, tensors, 0)
    rows = {"tokens": 512, "outputs": 512}
    return executors.open(edited, WeightStore(checkpoint), Limits(rows=rows))


def stored(values: Array, format: str) -> tuple[Stored, Array]:
    """In a number format, and what it then stands for."""
    if format == "bf16":
        upper = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        rounded = (upper.astype(np.uint32) << 16).view(np.float32)
        return Stored(format, upper.reshape(-1).view(np.uint8), None), rounded.reshape(values.shape)
    typed = values.astype({"f32": np.float32, "f16": np.float16}[format])
    return Stored(format, typed.reshape(-1).view(np.uint8), None), typed.astype(np.float32)


class Made:
    """A random adapter, with the deltas that it stands for."""

    def __init__(self, executor: Executor, edited: Program, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.deltas: dict[Site, Array] = {}
        self.biases: dict[Site, Array] = {}
        terms: dict[Site, Term] = {}
        for site in dict.fromkeys(
            s for op in edited.ops if hasattr(op, "adapters") for s in sites(op)
        ):
            if rng.random() < 0.2:
                continue
            found = matrix(site[0])
            table, dense = site[0] == "table", rng.random() < 0.2
            rank = int(rng.choice([1, 5, 16, 33])) if not dense else found.cols
            scale, format = float(rng.uniform(0.2, 2)), str(rng.choice(["f32", "f16", "bf16"]))
            left, a = stored(rng.normal(0, 0.2, (found.rows, rank)).astype(np.float32), format)
            right, b = stored(
                rng.normal(0, 0.2, (found.cols, rank) if table else (rank, found.cols)), format
            )
            if dense:
                delta, left_right = a, (left, None) if table else (None, left)
            else:
                delta = a @ b.T if table else a @ b
                left_right = (left, right) if table else (right, left)
            bias = None if table or rng.random() < 0.5 else rng.normal(0, 1, found.rows)
            bias = None if bias is None else bias.astype(np.float32)
            terms[site] = Term(*left_right, rank, scale, bias)
            self.deltas[site] = scale * delta
            self.biases[site] = np.zeros(found.rows, np.float32) if bias is None else bias
        self.handle = executor.adapter(terms)


class Rows:
    """Rows with mixtures, and what each row's weights are."""

    def __init__(self, weights: dict[str, Array], edited: Program, adapters: list[Made]) -> None:
        self.weights, self.adapters, self.edited = weights, adapters, edited
        rng = np.random.default_rng()
        self.mixtures = [
            [(int(i), float(rng.uniform(0.1, 2))) for i in rng.permutation(len(adapters))[:n]]
            for n in (1, 1, 2, 3)
        ]

    def of_executor(self) -> tuple[Mixture, ...]:
        return tuple(
            tuple((self.adapters[i].handle, w) for i, w in mixture) for mixture in self.mixtures
        )

    def weight(self, site: Site, mixture: int, scalings: Array | None) -> tuple[Array, Array]:
        """The matrix and the bias of a row."""
        found = matrix(site[0])
        start = site[1] * found.rows
        w = self.weights[site[0]][start : start + found.rows].copy()
        bias = np.zeros(found.rows, np.float32)
        if mixture < 0:
            return w, bias
        for place, (i, weight) in enumerate(self.mixtures[mixture]):
            own = self.adapters[i]
            if site not in own.deltas:
                continue
            scaling = 1.0 if scalings is None else scalings[COLUMNS[site] + place]
            w += weight * scaling * own.deltas[site]
            bias += weight * own.biases[site]
        return w, bias

    def expected(self, id: int, mixture: int, scalings: Array | None) -> dict[str, Array]:
        def product(role: str, x: Array, expert: int = 0) -> Array:
            w, bias = self.weight((role, expert), mixture, scalings)
            return w @ x + bias

        x = 0.5 * self.weight(("table", 0), mixture, scalings)[0][id]
        scores = product("router", x)
        scores = np.exp(scores - scores.max())
        best = np.argsort(-scores, kind="stable")[:TOP_K]
        experts = [
            product("moe.down", silu(product("moe.gate", x, e)) * product("moe.up", x, e), e)
            for e in best.tolist()
        ]
        shares = scores[best] / scores[best].sum()
        return {
            "embed": x,
            "linear": 0.7 * silu(product("linear", x)),
            "gated": gelu(product("gate", x)) * product("up", x),
            "moe": x + sum(share * out for share, out in zip(shares, experts, strict=True)),
        }


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    from math import erf, sqrt

    return 0.5 * x * (1 + np.vectorize(erf)(x / sqrt(2)))


_ALL = list(
    dict.fromkeys(
        s for op in adaptable(program()).ops if hasattr(op, "adapters") for s in sites(op)
    )
)
COLUMNS = {site: 3 * number for number, site in enumerate(_ALL)}


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_get_what_their_adapters_add(
    weights: dict[str, Array], isa: str, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUALL_ISA", isa)
    width = 3 * len(COLUMNS)
    edited = adaptable(program(), COLUMNS, width) if scaled else adaptable(program())
    executor, plain = opened(weights, edited), opened(weights, program())
    rng = np.random.default_rng()
    adapters = [Made(executor, edited, int(rng.integers(2**31))) for _ in range(4)]
    of_rows = Rows(weights, edited, adapters)
    for rows in ROWS:
        ids = rng.integers(0, VOCAB, rows).astype(np.int32)
        mixture = rng.integers(-1, len(of_rows.mixtures), rows).astype(np.int32)
        mixture.sort() if rows % 2 else None
        scalings = rng.normal(0, 1, (rows, width)).astype(np.float32)
        everything = inputs(ids, mixture, scalings if scaled else None)
        found = executor.run(everything, mixtures=of_rows.of_executor())
        without = plain.run(inputs(ids, mixture, None))
        for row in rng.permutation(rows)[:4].tolist():
            own = scalings[row] if scaled else None
            wanted = of_rows.expected(int(ids[row]), int(mixture[row]), own)
            one = inputs(
                ids[row : row + 1], mixture[row : row + 1], own if own is None else own[None]
            )
            alone = executor.run(one, mixtures=of_rows.of_executor())
            for name in OUTPUTS:
                assert np.array_equal(alone[name][0], found[name][row]), (name, rows)
                np.testing.assert_allclose(found[name][row], wanted[name], rtol=2e-3, atol=2e-4)
                if mixture[row] < 0:
                    assert np.array_equal(without[name][row], found[name][row]), name


def inputs(ids: Any, mixture: Any, scalings: Array | None) -> dict[str, Any]:
    every = np.arange(len(ids), dtype=np.int32)
    given = {"ids": ids, "outputs": every, "mixture": mixture, "mixture.outputs": mixture}
    return given if scalings is None else {**given, "scalings": scalings}


def test_adapters_that_do_not_fit_are_refused(weights: dict[str, Array]) -> None:
    executor = opened(weights, adaptable(program()))
    b, _ = stored(np.ones((WIDE, 4), np.float32), "f32")
    a, _ = stored(np.ones((4, WIDTH), np.float32), "f32")
    for site, term in (
        (("linear", 1), Term(a, b, 4)),
        (("nothing", 0), Term(a, b, 4)),
        (("linear", 0), Term(a, b, 5)),
        (("linear", 0), Term(b, a, 4)),
        (("linear", 0), Term(None, b, 4)),
        (("linear", 0), Term(a, None, WIDTH)),
        (("table", 0), Term(None, a, WIDTH)),
        (("linear", 0), Term(None, None, WIDTH)),
        (("linear", 0), Term(a, b, 4, bias=np.ones(WIDE + 1, np.float32))),
    ):
        with pytest.raises(InvalidRequest, match="adapter"):
            executor.adapter({site: term})
    handle = executor.adapter({("linear", 0): Term(a, b, 4)})
    given = inputs(np.zeros(1, np.int32), np.ones(1, np.int32), None)
    with pytest.raises(InvalidRequest, match="adapters that are not there"):
        executor.run(given, mixtures=(((handle, 1.0),),))
