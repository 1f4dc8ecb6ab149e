"""Has the modules of `squall`, and forks a process for each command that it is asked to run."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from importlib import import_module
from pkgutil import iter_modules

import squall.cli

MORE = (
    "squall.model", "squall.server.run", "squall.executors.native", "squall.diffusion.files",
    "jinja2.sandbox", "typer._adapters", "llguidance",
)  # fmt: skip


def run(entry: str, folder: str, env: dict[str, str], arguments: list[str]) -> None:
    """As a new interpreter would, up to its end: to take all modules down takes long."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        for number, mode in enumerate(("r", "w", "w"))
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = ["squall", *arguments]
    code: int | str | None = None
    try:
        getattr(squall.cli, entry)()
    except SystemExit as end:
        code = end.code
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    asking = socket.socket(fileno=int(sys.argv[1]))
    for name in (*(f"squall.cli.{m.name}" for m in iter_modules(squall.cli.__path__)), *MORE):
        import_module(name)
    gc.freeze()
    while True:
        size, streams, _, _ = socket.recv_fds(asking, 4, 3)
        if not size:
            return
        asked = json.loads(asking.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        if (child := os.fork()) == 0:
            asking.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            run(*asked)
        for stream in streams:
            os.close(stream)
        asking.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


main()
