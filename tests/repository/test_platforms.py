"""Other operating systems: every module can be imported, and nothing is asked that is not there."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from project import modules

from squall import machine

UNIX = ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
# What the packages that Squall needs import, they have; Squall is imported anew.
ELSEWHERE = """
import importlib, os, signal, socket, sys

absent, names = sys.argv[1].split(), sys.argv[2].split()

def import_all():
    for name in names:
        importlib.import_module(name)

def import_on(platform):
    sys.platform = platform
    for name in [*sys.modules]:
        if name.split(".")[0] == "squall" and name != "squall._native":
            del sys.modules[name]
    import_all()
    from squall import machine
    machine.available_bytes(), machine.total_bytes(), machine.processor()
    machine.give_back(), machine.lower_priority(5), machine.after_fork(print)

import_all()
import_on("darwin")
sys.modules |= dict.fromkeys(absent)
for module, gone in ((os, "fork register_at_fork sched_getaffinity setpriority sysconf"),
                     (signal, "SIGHUP SIGKILL SIGUSR1 pthread_sigmask"), (socket, "AF_UNIX")):
    for name in gone.split():
        delattr(module, name)
import_on("win32")
"""
SKIPPED = ("__main__", "triton_")  # which runs the command; which need Triton


def test_every_module_can_be_imported() -> None:
    names = [".".join(("squall", *path.with_suffix("").parts)) for path, _ in modules()]
    names = [name.removesuffix(".__init__") for name in names]
    names = [name for name in names if not any(word in name for word in SKIPPED)]
    command = [sys.executable, "-c", ELSEWHERE, " ".join(UNIX), " ".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10000.\n"
        "Pages active:                            200000.\n"
        "Pages inactive:                           30000.\n"
        "Pages speculative:                          500.\n"
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    monkeypatch.setattr(machine, "_read", lambda _: "")
    assert machine.available_bytes() == 40500 * 16384
    assert (machine.total_bytes() or 0) > 1 << 28
