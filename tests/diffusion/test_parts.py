"""Networks opened for a run: the same bytes layer by layer, in no more memory than a layer's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers

from squall import encoder, executors
from squall.checkpoints.folder import open_folder
from squall.diffusion.parts import Network
from squall.executors import Placement
from squall.executors.memory import activations
from squall.quant import Plan
from squall.recipes.encoders import load_t5
from squall.weights import WeightStore

SIZES = {
    "vocab_size": 500, "d_model": 128, "d_kv": 32, "d_ff": 320, "num_layers": 4, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
ROWS = {"tokens": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("t5")
    transformers.T5EncoderModel(transformers.T5Config(**SIZES)).save_pretrained(path)
    return path


def network(folder: Path, *, isq: str | None = None, threads: int = 2, by_layer: bool = False):
    checkpoint = open_folder(folder)
    part = load_t5(checkpoint)
    store = WeightStore(checkpoint, plan=Plan.of(isq))
    program, pool = encoder.compile(part.spec, part.names), executors.thread_pool(threads)
    return Network(program, store, Placement(), pool, by_layer=by_layer)


def given(count: int = 40) -> dict:
    ids = np.arange(count, dtype=np.int32) * 7 % 500
    ends = np.full_like(ids, count)
    return {"tokens": ids, "spans": np.stack([np.zeros_like(ends), ends])}


def states(part: Network, between=lambda: None, count: int = 40) -> bytes:
    with part.opened(given(count), between) as run:
        return run(given(count))["states"].tobytes()


def test_layer_by_layer_gives_the_same_bytes(folder):
    whole = states(network(folder))
    assert states(network(folder, threads=1)) == whole
    called = []
    part = network(folder, by_layer=True)
    assert states(part, lambda: called.append(part._store.layouts.copy())) == whole
    assert called == [{}] * 5  # before each layer, and what is after the last
    assert states(part) == whole


def test_weights_are_in_memory_while_it_is_open_or_loaded(folder):
    part = network(folder)
    with part.opened(given(), lambda: None):
        assert part._store.layouts
    assert not part._store.layouts
    part.load(None)
    (laid,) = part._store.layouts.values()
    first = states(part)
    assert list(part._store.layouts.values()) == [laid]
    assert states(part, count=9) != first  # another size, on the same weights
    assert list(part._store.layouts.values()) == [laid]
    part.free()
    assert not part._store.layouts
    assert states(part) == first


def test_what_raises_between_layers_ends_it(folder):
    part, left = network(folder, by_layer=True), iter([None, None])
    with pytest.raises(StopIteration):
        states(part, lambda: next(left))
    assert not part._store.layouts


@pytest.mark.parametrize("isq", [None, "Q8_0", "Q4_0"])
def test_sizes_of_weights_are_told_before_they_are_read(folder, isq):
    part, cut = network(folder, isq=isq), network(folder, isq=isq, by_layer=True)
    executor = part._open(part.program, ROWS)
    found, told = executor.formats, part.formats
    assert sum(t.parameters for t in found) == sum(t.parameters for t in told)
    assert {t.format for t in found} == {t.format for t in told}
    assert abs(part.weight_bytes / executor.weight_bytes - 1) < 0.1
    assert cut.weight_bytes < part.weight_bytes / 1.5
    if isq is None:
        assert part.stored_bytes == part.weight_bytes


@pytest.mark.parametrize("isq", [None, "Q8_0"])
def test_activations_are_about_what_the_executor_takes(folder, isq):
    part = network(folder, isq=isq)
    for count in (8, 500):
        executor = part._open(part.program, {"tokens": count})
        about = activations(part.program, {"tokens": count}, integers=isq is not None)
        assert 0.9 < about / executor._native.buffer_bytes < 2
    before = part.needs(ROWS)
    part.load(None)
    assert before - part.needs(ROWS) == part.weight_bytes
