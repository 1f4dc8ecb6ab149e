"""One build for every processor: code for a newer one must not slip into what all of them run.

The linker keeps one copy of an inline function that several objects define. If that copy came from
an object compiled for AVX-512, every processor would run it, and most would stop.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from project import ROOT

OBJECTS = sorted(ROOT.glob("build/cp*/CMakeFiles/**/*.o"))
ISA_OBJECTS = [path for path in OBJECTS if path.name.startswith("kernels_")]


def shared_functions(path: Path) -> set[str]:
    command = ["nm", "--defined-only", "--format=posix", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    split = (line.split() for line in lines)
    return {fields[0] for fields in split if len(fields) > 1 and fields[1] in "WVu"}


@pytest.mark.skipif(not ISA_OBJECTS, reason="not built here")
@pytest.mark.parametrize("path", ISA_OBJECTS, ids=lambda path: path.name)
def test_no_function_is_shared_with_another_object(path: Path) -> None:
    others = set().union(*(shared_functions(other) for other in OBJECTS if other != path))
    assert not shared_functions(path) & others
