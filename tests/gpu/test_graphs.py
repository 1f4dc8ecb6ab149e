"""Steps as graphs: padded, on buffers of their own, and the same bytes as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import test_program as programs
from gpu.on_torch import on_torch
from native_executor import in_memory
from reference_executor import ReferenceExecutor
from squall.batch import Batch
from squall.gpu.graphs import Graphs, Outputs, padded_rows
from squall.program import Program
from squall.roles import roles
from squall.spec import Layer, Moe

BLOCK, BLOCKS, CONTEXT, VOCAB = 16, 280, 64, 50


class Repeated:
    """Stands for CUDA's graphs: what is recorded is done again, on the tensors that there were."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, act: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        self.recorded += 1
        outputs = {name: torch.empty_like(out) for name, out in act().items()}

        def replay() -> None:
            self.replayed += 1
            for name, out in act().items():
                outputs[name].copy_(out)

        return replay, outputs


def failing(act: object) -> tuple[Callable[[], object], Outputs]:  # noqa: ARG001
    raise RuntimeError("operation not permitted when stream is capturing")


def decoder(rng: np.random.Generator) -> tuple[Program, Any]:
    """Of two layers, one with a mixture of experts."""
    layers = (
        Layer(programs.ATTENTION, programs.MLP, programs.NORM),
        Layer(programs.ATTENTION, Moe(4, 2, 24, "silu", normalize=True), programs.NORM),
    )
    spec = programs.decoder(*layers, logit_softcap=30.0)
    arrays = {}
    for role, shape in roles(spec).items():
        flat = (int(np.prod(shape[:-1])), shape[-1]) if shape[1:] else shape
        arrays[role] = rng.normal(0, 0.2, flat).astype(np.float32)
    return programs.program(spec), in_memory(arrays)


def step(rng: np.random.Generator, spans: list[tuple[int, int]]) -> Batch:
    """Sequences at positions start:stop; logits of the last of each."""
    counts = [stop - start for start, stop in spans]
    bounds = np.cumsum([0, *counts]).astype(np.int32)
    tables = np.arange(BLOCKS, dtype=np.int32)[::-1].reshape(-1, CONTEXT // BLOCK)
    return Batch(
        tokens=rng.integers(0, VOCAB, bounds[-1]).astype(np.int32),
        positions=np.concatenate([np.arange(*span) for span in spans]).astype(np.int32),
        bounds=bounds,
        block_tables=tables[: len(spans)],
        outputs=bounds[1:] - 1,
    )


@pytest.fixture
def model(rng: np.random.Generator) -> tuple[Program, Any]:
    return decoder(rng)


@pytest.fixture
def pair(model: tuple[Program, Any]) -> tuple[Any, Any, Repeated]:
    """The same executor twice, the first with graphs; and what records them."""
    program, checkpoint = model
    kept = ("embed",)
    limits = {"blocks": BLOCKS, "kv_dtype": "f32"}
    graphed, plain = (
        on_torch(program, checkpoint, {"tokens": 512, "outputs": 64}, keep=kept, **limits)
        for _ in range(2)
    )
    recorder = Repeated()
    graphed._graphs = Graphs(recorder.record)
    return graphed, plain, recorder


@pytest.mark.parametrize("sequences", [1, 3, 8, 33])
def test_padded_steps_have_the_same_bytes(
    sequences: int, pair: tuple[Any, Any, Repeated], rng: np.random.Generator
) -> None:
    graphed, plain, recorder = pair
    starts = rng.integers(16, 25, sequences)
    for number in range(4):
        batch = step(rng, [(start + number, start + number + 1) for start in starts.tolist()])
        found, wanted = graphed.step(batch), plain.step(batch)
        assert found.shape == (sequences, VOCAB)
        assert found.tobytes() == wanted.tobytes(), number
        assert graphed.value("embed").tobytes() == plain.value("embed").tobytes()
    assert recorder.recorded >= 1
    assert recorder.replayed >= 2


def test_a_decoder_by_tritons_kernels(
    model: tuple[Program, Any],
    pair: tuple[Any, Any, Repeated],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interpreted: padded, the same bytes; and NumPy's logits."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    graphed, plain, recorder = pair
    reference = ReferenceExecutor(*model, blocks=BLOCKS)
    for start in range(17, 20):
        batch = step(rng, [(start, start + 1), (start - 9, start - 8), (start + 3, start + 4)])
        found, wanted = graphed.step(batch), plain.step(batch)
        assert found.tobytes() == wanted.tobytes()
        np.testing.assert_allclose(found, reference.step(batch), atol=1e-4)
    assert recorder.recorded == 1


def test_shapes_have_graphs_of_their_own(
    pair: tuple[Any, Any, Repeated], rng: np.random.Generator
) -> None:
    """Rows padded alike share one; a longer context, and more rows, have others."""
    graphed, plain, recorder = pair
    for sequences, position, recorded in (
        (3, 5, 0), (4, 6, 1), (3, 7, 1), (5, 5, 1), (8, 5, 2), (4, 20, 2), (3, 21, 3), (3, 6, 3),
    ):  # fmt: skip
        batch = step(rng, [(position, position + 1)] * sequences)
        assert graphed.step(batch).tobytes() == plain.step(batch).tobytes()
        assert recorder.recorded == recorded, (sequences, position)


def test_steps_that_are_no_graphs(
    pair: tuple[Any, Any, Repeated], rng: np.random.Generator
) -> None:
    """Long ones, and those of a profile."""
    graphed, plain, recorder = pair
    for _ in range(3):
        batch = step(rng, [(0, 40), (0, 25)])
        assert graphed.step(batch).tobytes() == plain.step(batch).tobytes()
        batch = step(rng, [(3, 4)])
        assert graphed.profile(lambda batch=batch: graphed.step(batch))
    assert recorder.recorded == 0


def test_only_so_many_are_kept(rng: np.random.Generator) -> None:
    recorder = Repeated()
    graphs, device = Graphs(recorder.record, most=3), torch.device("cpu")
    staged = {key: torch.full((4,), key, dtype=torch.int32) for key in range(5)}
    for _ in range(90):
        key = int(rng.integers(0, 5))
        out = graphs.run(key, staged[key], device, lambda inputs: {"out": inputs * 2})
        assert out["out"].tolist() == [2 * key] * 4
        assert len(graphs._graphs) <= 3
    assert recorder.recorded > 3


def test_a_device_that_captures_nothing(caplog: pytest.LogCaptureFixture) -> None:
    graphs, device = Graphs(failing), torch.device("cpu")
    for key in (0, 1):
        for _ in range(3):
            staged = torch.full((4,), key, dtype=torch.int32)
            out = graphs.run(key, staged, device, lambda inputs: {"out": inputs + 1})
            assert out["out"].tolist() == [key + 1] * 4
    assert not any(graphs._graphs.values())
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text


def test_rows_are_padded_to_powers_of_two() -> None:
    found = [padded_rows(rows) for rows in (0, 1, 2, 3, 4, 5, 33, 64)]
    assert found == [0, 1, 2, 4, 4, 8, 64, 64]
