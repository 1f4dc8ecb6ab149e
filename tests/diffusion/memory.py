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

from squall import ImageModel, PictureRequest

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


def picture(folder: str) -> list[int]:
    """What a picture takes as flux-offloaded, what it was to take, and all weights."""
    with ImageModel.open(folder, architecture="flux-offloaded") as model:
        request = PictureRequest(prompt="a cat", width=48, height=32, steps=3)
        peak = peak_of(model.submit(request).result)
        stored = sum(part.stored_bytes for part in model._pipeline.parts.values())
        return [peak, model._pipeline.needs(request), stored]


def in_process(call: str) -> Any:
    """What a call of these gives in a process of its own."""
    code = f"import json, memory; print(json.dumps(memory.{call}))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return json.loads(done.stdout)
