"""Runs that share a pool of threads: patient ones give way to steps, and no byte changes."""

from __future__ import annotations

import threading

import numpy as np

from native_executor import in_memory
from squall import executors
from squall.executors import Limits
from squall.program import Builder, Linear, Matrix, Program, Slice
from squall.weights import WeightStore

WIDTH, LAYERS = 96, 12


def stack() -> Program:
    b = Builder()
    x = given = b.value("x", WIDTH)
    for i in range(LAYERS):
        weight = Matrix((Slice(f"w{i}", 0, WIDTH),), WIDTH, WIDTH, role=f"w{i}")
        x = b.emit(Linear(b.value(f"y{i}", WIDTH), x, weight, None, "quick_gelu"))
    return b.build(x, inputs=(given,))


def test_a_patient_run_beside_steps_gives_the_same_bytes(rng: np.random.Generator) -> None:
    """Two towers at once, while steps follow each other; all on one pool."""
    scale = WIDTH**-0.5
    weights = {
        f"w{i}": rng.normal(0, scale, (WIDTH, WIDTH)).astype(np.float32) for i in range(LAYERS)
    }
    store, pool = WeightStore(in_memory(weights)), executors.thread_pool(2)
    name = f"y{LAYERS - 1}"
    towers = [
        executors.open(stack(), store, Limits(rows={"tokens": 3000}), pool=pool) for _ in range(2)
    ]
    engine = executors.open(stack(), store, Limits(rows={"tokens": 8}), pool=pool)
    image, tokens = (rng.standard_normal((rows, WIDTH), np.float32) for rows in (3000, 3))
    wanted = towers[0].run({"x": image})[name]
    step = engine.run({"x": tokens})[name]
    found: list[bytes] = []

    def encode(tower: executors.Executor) -> None:
        found.extend(tower.run({"x": image}, patient=True)[name].tobytes() for _ in range(3))

    threads = [threading.Thread(target=encode, args=(tower,)) for tower in towers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert engine.run({"x": tokens})[name].tobytes() == step.tobytes()
    assert found == [wanted.tobytes()] * 6
