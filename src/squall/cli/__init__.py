"""The command `squall`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from squall.errors import SquallError


def main() -> None:
    """Run the command line; errors are one line on stderr and exit status 1 (2 for wrong usage)."""
    from squall.cli.app import app

    _run(app)


def server() -> None:
    """The same for `squall-server`."""
    from squall.cli.serve import server as app

    _run(app)


def _run(app: Callable[[], object]) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app()
    except SquallError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except BrokenPipeError:
        # The reader has left; keep the interpreter from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
