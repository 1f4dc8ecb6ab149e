"""Runs `squall` in a process of its own."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

TIMEOUT_S = 120
PIPE = 1 << 16  # bytes that a pipe holds while nobody reads
NURSERY = Path(__file__).with_name("nursery.py")
AT_START = "SQUALL_ISA", "TRITON_", "PYTHON", "OMP_"  # what is read as modules are imported
_BASE = dict(os.environ)


def squall(
    *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None, fresh: bool = False,
    entry: str = "main", cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """The finished process; standard input is a pipe with `stdin` in it.

    It is forked from one that has all modules, which saves most of its time, but for `fresh` ones.
    """
    own = os.environ | (env or {})
    changed = {name for name, _ in own.items() ^ _BASE.items() if name.startswith(AT_START)}
    if fresh or changed or len(stdin) >= PIPE or not hasattr(os, "fork"):
        code = f"from squall.cli import {entry}; {entry}()"
        return subprocess.run(
            [sys.executable, *(("-m", "squall") if entry == "main" else ("-c", code)), *arguments],
            input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, encoding="utf-8",
            env=own, cwd=cwd,
        )  # fmt: skip
    asked = json.dumps([entry, str(cwd or Path.cwd()), own, arguments]).encode()
    return _forked(asked, stdin)


@cache
def _nursery() -> socket.socket:
    """To the process that forks."""
    here, there = socket.socketpair()
    with there:
        command = [sys.executable, str(NURSERY), str(there.fileno())]
        process = subprocess.Popen(command, pass_fds=[there.fileno()], env=_BASE)
    atexit.register(process.wait)
    atexit.register(here.close)
    here.settimeout(TIMEOUT_S)
    return here


def _forked(asked: bytes, stdin: str) -> subprocess.CompletedProcess[str]:
    nursery = _nursery()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        read, write = os.pipe()
        with open(read) as given:
            with open(write, "wb") as pipe:
                pipe.write(stdin.encode())
            size = len(asked).to_bytes(4, "big")
            socket.send_fds(nursery, [size], [given.fileno(), out.fileno(), err.fileno()])
        nursery.sendall(asked)
        try:
            code = int(nursery.recv(16))
        except TimeoutError:
            _nursery.cache_clear()  # that one ends as its socket is closed
            nursery.close()
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode().replace("\r\n", "\n"))
        return subprocess.CompletedProcess("squall", code, *texts)
