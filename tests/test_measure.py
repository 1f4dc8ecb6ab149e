"""What `squall.measure` counts, against sums over the program; of times only that they add up."""

from __future__ import annotations

import pytest

from squall import program as p
from squall.assembly import prepare
from squall.errors import InvalidRequest
from squall.measure import Bench, Profile, Workload
from squall.opening import Opening

PLAN = Workload(prompt=24, answer=3, depth=20, batch=2)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(prepare(Opening()), PLAN, threads=2)


@pytest.fixture(scope="module")
def profiles(bench: Bench) -> dict[str, Profile]:
    return {found.test: found for found in bench.profiles()}


def linear_products(bench: Bench, rows: int, outputs: int) -> int:
    """Multiply-accumulates of the program's linear ops."""
    total = 0
    for op in bench.executor.program.ops:
        many = outputs if op.out.rows == "outputs" else rows
        if isinstance(op, p.Linear):
            total += many * op.weight.rows * op.weight.cols
        elif isinstance(op, p.GatedLinear):
            total += 2 * many * op.gate.rows * op.gate.cols
    return total


def attended(bench: Bench, positions: range) -> tuple[int, int]:
    """Of one sequence with a step a position: bytes of cache, and multiply-accumulates."""
    seen = sum(position + 1 for position in positions)
    attends = [op for op in bench.executor.program.ops if isinstance(op, p.Attend)]
    assert all(op.window is None for op in attends)
    of_bytes = sum(seen * 2 * op.kv_heads * op.head_dim * 2 for op in attends)
    return of_bytes, sum(seen * 2 * op.heads * op.head_dim for op in attends)


def test_names_and_steps(profiles: dict[str, Profile]) -> None:
    assert {name: found.steps for name, found in profiles.items()} == {
        "pp24@d20@b2": 2,
        "tg3@d20@b2": 3,
    }


def test_products_of_linears(bench: Bench, profiles: dict[str, Profile]) -> None:
    prompt, answer = (sum(phase.dots for phase in found.phases) for found in profiles.values())
    assert prompt == 2 * linear_products(bench, rows=24, outputs=1)
    assert answer == 3 * linear_products(bench, rows=2, outputs=2)


def test_weights_are_read_once_a_step(bench: Bench, profiles: dict[str, Profile]) -> None:
    for found in profiles.values():
        read = sum(phase.bytes for phase in found.phases if "linear" in phase.name)
        assert read == found.steps * bench.executor.weight_bytes


def test_attention(bench: Bench, profiles: dict[str, Profile]) -> None:
    (prompt,), (answer,) = (
        [phase for phase in found.phases if phase.name == "attend"] for found in profiles.values()
    )
    last, _ = attended(bench, range(43, 44))
    _, products = attended(bench, range(20, 44))
    assert (prompt.bytes, prompt.fmas) == (2 * last, 2 * products)
    of_bytes, products = attended(bench, range(44, 47))
    assert (answer.bytes, answer.fmas) == (2 * of_bytes, 2 * products)


def test_times_add_up(profiles: dict[str, Profile]) -> None:
    for found in profiles.values():
        assert sum(phase.elapsed_s for phase in found.phases) == pytest.approx(found.elapsed_s)
        assert all(-1e-9 <= phase.waiting_s <= phase.elapsed_s for phase in found.phases)


def test_profiles_begin_at_zero(bench: Bench, profiles: dict[str, Profile]) -> None:
    bench.rates(1)
    again = {found.test: found for found in bench.profiles()}
    for name, found in profiles.items():
        work = {(phase.name, phase.bytes, phase.dots, phase.fmas) for phase in found.phases}
        assert work == {(x.name, x.bytes, x.dots, x.fmas) for x in again[name].phases}


def test_nothing_to_measure() -> None:
    with pytest.raises(InvalidRequest, match="nothing to measure"):
        Bench(prepare(Opening()), Workload(0, 0))


def test_another_plan_with_the_same_weights_and_cache(bench: Bench) -> None:
    try:
        bench.plan(Workload(prompt=10, answer=0, depth=3, rows=4))
        (found,) = bench.profiles()
        assert (found.test, found.steps) == ("pp10@d3", 3)
        bench.plan(Workload(prompt=0, answer=2, batch=6))
        (found,) = bench.profiles()
        assert (found.test, found.steps) == ("tg2@b6", 2)
        with pytest.raises(InvalidRequest, match="112 tokens; the cache has 96"):
            bench.plan(Workload(prompt=100, answer=5))
    finally:
        bench.plan(PLAN)
