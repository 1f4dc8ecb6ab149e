"""Rows of several adapters in a step have the bytes that they have alone, in every architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from config_cases import CONFIG_CASES
from harness import BLOCK, BLOCKS, Float32, build_folder, make_batch

from squall.adapters.edits import adaptable
from squall.batch import Mixture
from squall.decoder import compile
from squall.executors import Adapter, Executor, Limits, open, thread_pool
from squall.program import Embed, Program, matrices
from squall.quant import Plan
from squall.weights import Stored, Term, WeightStore

CASES = {case.name: case for case in [*tiny.CASES, *CONFIG_CASES]}
# One of each architecture.
NAMES = sorted({case.architecture: name for name, case in reversed(CASES.items())}.values())
LENGTH, SEQUENCES = 30, 4

pytestmark = pytest.mark.filterwarnings("ignore")


def adapter(executor: Executor, program: Program, rng: np.random.Generator) -> Adapter:
    """Of all weights, the embedding, the experts and the head too; some are left out by chance."""

    def random(*shape: int) -> Stored:
        values = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        return Stored("f32", values.reshape(-1).view(np.uint8), None)

    terms = {}
    for op in program.ops:
        for found in matrices(op) if getattr(op, "adapters", None) else ():
            for expert in range(found.experts):
                rank = int(rng.integers(1, 20))
                a, b = (rank, found.cols), (found.rows, rank)
                if isinstance(op, Embed):
                    a, b = (found.rows, rank), (found.cols, rank)
                if rng.random() < 0.9:
                    terms[found.role, expert] = Term(random(*a), random(*b), rank)
    return executor.adapter(terms)


def computed(
    executor: Executor,
    tokens: list[list[int]],
    mixtures: tuple[Mixture, ...],
    steps: list[list[tuple[int, int]]],
) -> list[Float32]:
    """The logits of each sequence. steps: (sequence, tokens) of each; the last has no adapters."""
    found: list[list[Float32]] = [[] for _ in tokens]
    for step in steps:
        at = [sum(map(len, found[s])) for s, _ in step]
        parts = [(tokens[s][i : i + n], i, s) for i, (s, n) in zip(at, step, strict=True)]
        rows = [s if s < len(mixtures) else -1 for s, n in step for _ in range(n)]
        batch = replace(make_batch(parts), mixture=np.array(rows, np.int32), mixtures=mixtures)
        logits = executor.step(batch).copy()
        for (s, n), end in zip(step, np.cumsum([n for _, n in step]), strict=True):
            found[s].append(logits[end - n : end])
    return [np.concatenate(parts) for parts in found]


@pytest.mark.parametrize("isq", [None, "Q4_0"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bytes_alone_and_together(name: str, isq: str | None, tmp_path: Path) -> None:
    built, rng = build_folder(CASES[name], tmp_path), np.random.default_rng(3)
    recipe = built.recipe
    program = adaptable(compile(recipe.decoder, recipe.names, context=tiny.CONTEXT))
    limits = Limits(blocks=BLOCKS, block_size=BLOCK)
    store = WeightStore(built.checkpoint, plan=Plan.of(isq))
    executor = open(program, store, limits, pool=thread_pool(2))
    first, second = (adapter(executor, program, rng) for _ in range(2))
    mixtures = (((first, 1.0),), ((second, 0.5),), ((second, -0.7), (first, 0.3)))
    tokens = rng.integers(3, recipe.decoder.vocab, (SEQUENCES, LENGTH)).tolist()
    tokens[1:] = [tokens[0]] * 2 + [tokens[3]]  # so that only adapters tell them apart
    alone = [[(s, LENGTH)] for s in range(SEQUENCES)]
    one = [[(s, 1) for s in range(SEQUENCES)] for _ in range(LENGTH)]
    mixed = [[(2, 9), (0, 1), (3, 20)], [(1, 30), (0, 28)], [(0, 1), (3, 10), (2, 21)]]
    right = computed(executor, tokens, mixtures, alone)
    assert len({logits.tobytes() for logits in right}) == SEQUENCES
    for steps in (one, mixed):
        for found, wanted in zip(computed(executor, tokens, mixtures, steps), right, strict=True):
            np.testing.assert_array_equal(found, wanted)
    plain = open(
        compile(recipe.decoder, recipe.names, context=tiny.CONTEXT), store, limits,
        pool=thread_pool(1),
    )  # fmt: skip
    wanted = plain.step(make_batch([(tokens[3], 0, 3)]))
    np.testing.assert_array_equal(right[3], wanted)
