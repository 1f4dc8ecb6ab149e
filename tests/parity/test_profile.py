"""A profile of a mixture of experts counts the experts that were chosen."""

from __future__ import annotations

import tiny
from harness import BLOCK, BLOCKS, Build, make_batch

from native_executor import native
from squall import decoder
from squall import program as p

(CASE,) = (case for case in tiny.CASES if case.name == "mixtral")


def test_chosen_experts(built: Build) -> None:
    model = built(CASE)
    program = decoder.compile(model.recipe.decoder, model.recipe.names, context=tiny.CONTEXT)
    executor = native(program, model.checkpoint, blocks=BLOCKS, block_size=BLOCK)
    mixtures = [op for op in program.ops if isinstance(op, p.MixtureOfExperts)]
    assert len(mixtures) == 4
    for rows in (1, 9):
        batch = make_batch([(model.tokens[:rows], 0, 0)])
        phases = executor.profile(lambda batch=batch: executor.step(batch))
        gated = [phase for phase in phases if phase.name.startswith("moe gated linear")]
        down = [phase for phase in phases if phase.name.startswith("moe linear")]
        for op, first, second in zip(mixtures, gated, down, strict=True):
            pairs = rows * op.top_k
            one = op.gate.rows * op.gate.cols
            assert (first.fmas + first.dots, second.fmas + second.dots) == (
                pairs * 2 * one,
                pairs * one,
            )
            assert first.bytes == 2 * second.bytes
            # The file is float32; one row reads exactly the experts it chose.
            experts, rest = divmod(second.bytes, 4 * one)
            assert rest == 0
            assert experts == op.top_k if rows == 1 else op.top_k <= experts <= op.gate.experts
