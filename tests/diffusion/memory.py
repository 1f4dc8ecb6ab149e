"""How much memory of its own a process comes to take, as Linux tells."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STATUS = Path("/proc/self/status")
told_by_linux = pytest.mark.skipif(not STATUS.exists(), reason="reads what Linux tells")


def taken() -> int:
    """Bytes that are in no file."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_of(act: Callable[[], Any]) -> int:
    """The most that is taken at a time, beyond what was before."""
    before, most, over = taken(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.0005):
            most = max(most, taken())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        act()
    finally:
        over.set()
        thread.join()
    return most - before


def in_process(module: str, call: str) -> Any:
    """What an expression gives in a process of its own, by JSON; its module lies here."""
    code = f"import json, {module}; print(json.dumps({module}.{call}))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])
