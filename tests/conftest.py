"""What all tests share: one CPU a worker, the order, nightly's longer runs, and random numbers.

docs/testing.md says how the tests are run.
"""

from __future__ import annotations

import gc
import os
import secrets
from collections import defaultdict
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    import numpy as np

SLOW_S = 5.0  # from which on a test should say why
NIGHTLY = os.environ.get("SQUALL_NIGHTLY") == "1"
DEVICE = os.environ.get("SQUALL_TEST_DEVICE")
_FREEZE = gc.freeze, gc.unfreeze


def _take_one_cpu() -> None:
    """A worker of xdist keeps to one CPU, and so do the processes that it starts.

    Before NumPy and torch are loaded, whose threads would wait for each other's CPU.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(worker.removeprefix("gw")) % len(cpus)]})


def _take_device(device: str) -> None:
    """Models run there, in float32, unless a test says where."""
    from squall import executors
    from squall.executors.devices import Placement, Stage, device_name
    from squall.opening import DEFAULTS, Opening

    placement = Placement((Stage(device_name(device)),), dtype="f32")
    executors.open.__kwdefaults__["placement"] = placement
    Opening.__init__.__kwdefaults__ |= {"device": device, "dtype": "f32"}
    for name in ("device", "dtype"):
        object.__setattr__(DEFAULTS, name, Opening.__init__.__kwdefaults__[name])


def _interpret_triton() -> None:
    """Triton is loaded as tests/gpu needs it, before what loads it too, such as diffusers."""
    if find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("language", "experimental.gluon", "runtime.interpreter"):
        import_module(f"triton.{name}")
    del os.environ["TRITON_INTERPRET"]


_take_one_cpu()
_interpret_triton()
if DEVICE is not None:
    _take_device(DEVICE)
hypothesis.settings.register_profile("check", deadline=None, max_examples=60)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=3000)
hypothesis.settings.load_profile("nightly" if NIGHTLY else "check")


def pytest_sessionstart() -> None:
    """No garbage is looked for while modules are imported and tests collected."""
    gc.disable()


def pytest_collection_finish() -> None:
    """A million objects stay to the end: neither the collector nor servers look at them again."""
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]
    gc.enable()


def pytest_unconfigure() -> None:
    gc.freeze, gc.unfreeze = _FREEZE
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that no worker is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not NIGHTLY:
        for item in items:
            if (marker := item.get_closest_marker("nightly")) is not None:
                item.add_marker(pytest.mark.skip(reason=f"make nightly: {marker.args[0]}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The files that took longest, and slow tests that do not say why."""
    files: dict[str, float] = defaultdict(float)
    unmarked: list[tuple[float, str]] = []
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            files[report.nodeid.split("::")[0]] += report.duration
            if report.duration >= SLOW_S and "slow" not in report.keywords:
                unmarked.append((report.duration, f"{report.when} {report.nodeid}"))
    if sum(files.values()) < 60:
        return
    terminalreporter.section("slowest files")
    for file, seconds in sorted(files.items(), key=lambda pair: -pair[1])[:10]:
        terminalreporter.line(f"{seconds:6.1f} s  {file}")
    if unmarked:
        terminalreporter.section(f"over {SLOW_S:g} s without @pytest.mark.slow(reason)")
        for seconds, test in sorted(unmarked, reverse=True):
            terminalreporter.line(f"{seconds:6.1f} s  {test}")


@pytest.fixture(scope="session")
def nightly() -> bool:
    """Whether there is time for the long runs."""
    return NIGHTLY


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers every run; a failure shows the seed that repeats it."""
    import numpy as np

    seed = int(os.environ.get("SQUALL_TEST_SEED") or secrets.randbits(63))
    request.node.add_report_section("setup", "seed", f"repeat with SQUALL_TEST_SEED={seed}")
    return np.random.default_rng(seed)
