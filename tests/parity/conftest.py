"""Models built once a run, and the executors that are held against them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
from harness import BLOCK, BLOCKS, Build, MakeExecutor, build, build_folder, once

from native_executor import native
from reference_executor import ReferenceExecutor
from squall import _native
from squall.checkpoints.base import Checkpoint
from squall.program import Program


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds, converts and runs the model of a case, once."""
    return once(tmp_path_factory.mktemp("parity"), "{}.gguf", build)


@pytest.fixture(scope="session")
def built_folder(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The same, as a folder with config.json."""
    return once(tmp_path_factory.mktemp("folders"), "{}", build_folder)


def _options(keep: Sequence[str]) -> dict[str, Any]:
    return {"blocks": BLOCKS, "block_size": BLOCK, "keep": keep}


def _reference(program: Program, checkpoint: Checkpoint, keep: Sequence[str] = ()) -> Any:
    return ReferenceExecutor(program, checkpoint, **_options(keep))


def _native_on(isa: str) -> MakeExecutor:
    def make(program: Program, checkpoint: Checkpoint, keep: Sequence[str] = ()) -> Any:
        with pytest.MonkeyPatch.context() as environment:
            if isa:
                environment.setenv("SQUALL_ISA", isa)
            options = _options(keep)
            return native(program, checkpoint, kv_dtype="f32", threads=1, **options)

    return make


EXECUTORS = {"reference": _reference} | {isa: _native_on(isa) for isa in _native.isas()}
if (DEVICE := os.environ.get("SQUALL_TEST_DEVICE")) is not None:
    EXECUTORS = {DEVICE: _native_on("")}


@pytest.fixture(params=EXECUTORS.values(), ids=EXECUTORS.keys())
def make_executor(request: pytest.FixtureRequest) -> MakeExecutor:
    """Each executor, on each instruction set, with a float32 KV cache."""
    make: MakeExecutor = request.param
    return make


@pytest.fixture
def make_reference() -> MakeExecutor:
    """The NumPy executor."""
    return _reference
