"""The command `squall`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pkgutil import resolve_name

from squall.errors import SquallError
from squall.files import printable

INTERRUPTED = 130


def main() -> None:
    """Run the command line; errors are one line on stderr and exit status 1 (2 for wrong usage)."""
    _run("squall.cli.app:app", "squall")


def server() -> None:
    _run("squall.cli.serve:server", "squall-server")


def _run(app: str, name: str) -> None:
    _open_streams()
    try:
        try:
            resolve_name(app)(prog_name=name)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:  # before a command began, which ends as it sees fit
        sys.exit(INTERRUPTED)
    except SystemExit as ending:
        if ending.code == INTERRUPTED:  # now: downloads in threads would be waited for
            os._exit(INTERRUPTED)
        raise
    except Exception as error:
        if os.environ.get("SQUALL_DEBUG"):
            raise
        # Keep the interpreter from flushing once more, at its exit, into what cannot be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader has left, which is no error
            with suppress(OSError):
                sys.stderr.write(f"error: {printable(_reason(error))}\n")
        sys.exit(1)


def _open_streams() -> None:
    """Streams that are closed fail when they are written to; they are not None."""
    for name, mode in (("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            # What is open for reading cannot be written to.
            setattr(sys, name, os.fdopen(os.open(os.devnull, mode), "w"))
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _reason(error: Exception) -> str:
    if isinstance(error, SquallError):
        return str(error)
    if isinstance(error, OSError):
        file = "" if error.filename is None else f" {error.filename}"
        return f"cannot read or write{file}: {error.strerror or error}"
    lines = str(error).splitlines() or [""]
    kind = type(error).__name__
    return f"{kind}: {lines[0]} (not foreseen; with SQUALL_DEBUG=1 it tells where)"
