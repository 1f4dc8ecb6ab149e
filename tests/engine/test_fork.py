"""After a fork: the child is told at once, and the parent does not notice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_requests import alone, request
from fake_executor import FakeExecutor, Silent

from squall.engine import engine as module
from squall.engine.engine import Engine
from squall.engine.generation import Generation
from squall.errors import EngineStopped

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")

WAIT_S = 20


def in_child(run: Callable[[], None]) -> int:
    """How a child ends that runs this: 0 if well, 1 after an error, -14 if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            import signal

            signal.alarm(WAIT_S)
            run()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
def engine(executor: FakeExecutor) -> Iterator[Engine]:
    engine = Engine(executor, text=Silent)
    yield engine
    executor.let()
    engine.close()


@pytest.mark.parametrize("lock", [False, True])
def test_a_child_is_refused_and_the_parent_goes_on(
    engine: Engine, executor: FakeExecutor, lock: bool
) -> None:
    """In the middle of a step, and while another thread holds the lock."""
    executor.hold()
    generation = Generation(engine, request([1], max_tokens=20))
    executor.wait()

    def child() -> None:
        for use in (
            lambda: engine.submit(request([2]), print),
            lambda: engine.change_model(print),
            lambda: generation.read(),
        ):
            with pytest.raises(EngineStopped, match="forked after the model was opened"):
                use()
        assert not engine.alive
        assert engine.stats().stalled_s == 0
        engine.check_room()
        generation.close()
        assert engine.drain()
        module._close_all()
        generation.__del__()

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with engine._lock:
            held.set()
            done.wait(WAIT_S)

    thread = threading.Thread(target=hold)
    if lock:
        thread.start()
        held.wait(WAIT_S)
    assert in_child(child) == 0
    done.set()
    executor.let()
    generation.read()
    assert generation.ids == alone(request([1], max_tokens=20))
    assert generation.finish_reason == "length"
    if lock:
        thread.join()


def test_an_engine_of_the_childs_own_works(engine: Engine) -> None:
    Generation(engine, request([1])).read()

    def child() -> None:
        own = Engine(FakeExecutor(), text=Silent)
        generation = Generation(own, request([1]))
        generation.read()
        assert generation.ids == alone(request([1]))
        own.close()

    assert in_child(child) == 0


SCRIPT = """
import multiprocessing, sys
from engine_requests import alone, request
from fake_executor import FakeExecutor, Silent
from squall.engine.engine import Engine
from squall.engine.generation import Generation
from squall.errors import EngineStopped

def child():
    try:
        Generation(engine, request([2]))
    except EngineStopped:
        sys.exit(7)

executor = FakeExecutor()
engine = Engine(executor, text=Silent)
executor.hold()
generation = Generation(engine, request([1]))
executor.wait()
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(20)
print(process.exitcode)
executor.let()
generation.read()
print(generation.ids == alone(request([1])))
executor.hold()
second = Generation(engine, request([1]))
executor.wait()
import os
pid = os.fork()
if pid == 0:
    sys.exit(5)  # with all that is done at exit
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
executor.let()
"""


def test_children_end_on_their_own() -> None:
    """Of multiprocessing, and with an orderly exit while the parent is in a step."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCRIPT],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert found.stdout.split() == ["7", "True", "5"]
    assert "Error" not in found.stderr
