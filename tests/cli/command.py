"""Runs `squall` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def squall(
    *arguments: str, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The finished process; standard input is a pipe with `stdin` in it."""
    return subprocess.run(
        [sys.executable, "-m", "squall", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        encoding="utf-8",
        env=os.environ | (env or {}),
    )
