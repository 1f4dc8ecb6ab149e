"""This machine: its memory and processor, and what not every operating system can do."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path


def available_bytes() -> int | None:
    """What the machine and this process's control groups leave; None where neither can be asked."""
    limits = [*_memory("MemAvailable"), *_control_groups()]
    return min(limits, default=None)


def total_bytes() -> int | None:
    """What the machine has; None where it cannot be asked."""
    return next(_memory("MemTotal"), None)


def processor() -> str:
    """Its name."""
    names = re.findall(r"^model name\s*: *(.*)", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return next(iter(names), "") or platform.processor() or platform.machine()


def largest_cache_bytes() -> int:
    """Of the processor; 0 where it cannot be asked."""
    sizes = re.findall(
        r"^(\d+)K$",
        "".join(map(_read, Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))),
        re.MULTILINE,
    )
    return max(map(int, sizes), default=0) << 10


def give_back() -> None:
    """Give the system what the C library keeps of memory that is free, where it can."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def lower_priority(nice: int) -> None:
    """This thread's alone, where threads have priorities of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def after_fork(call: Callable[[], object]) -> None:
    """Have it called in child processes, where there are such."""
    if sys.platform != "win32":
        os.register_at_fork(after_in_child=call)


def _memory(name: str) -> Iterator[int]:
    """As Linux names it."""
    if sys.platform == "darwin":
        yield from _darwin(name)
    elif sys.platform == "win32":
        with suppress(AttributeError, OSError):
            status = _Status(ctypes.sizeof(_Status))
            ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
            yield {"MemTotal": status.total, "MemAvailable": status.available}[name]
    else:
        for size in re.findall(rf"^{name}: *(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE):
            yield int(size) * 1024


class _Status(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64), ("others", ctypes.c_uint64 * 5),
    )  # fmt: skip


def _darwin(name: str) -> Iterator[int]:
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        if name == "MemTotal":
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return
        told = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True, timeout=5)
        pages = re.findall(r"^Pages (?:free|inactive|speculative): +(\d+)", told.stdout, re.M)
        yield sum(map(int, pages)) * int(re.findall(r"page size of (\d+)", told.stdout)[0])


def _control_groups() -> Iterator[int]:
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = "/sys/fs/cgroup", "memory.max", "memory.current"
            files = ("inactive_file ", "active_file ")
        elif "memory" in controllers.split(","):
            root, limit = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, files = "memory.usage_in_bytes", ("total_inactive_file ", "total_active_file ")
        else:
            continue
        leaf = Path(root, path.lstrip("/"))
        # A limit may sit at any level; in a container the root is the container's own group.
        for folder in (leaf, *leaf.parents):
            most, taken = _read(folder / limit).strip(), _read(folder / used).strip()
            if most.isdigit() and taken.isdigit():
                # Pages of files are counted, such as a model's, and make room for others.
                lines = _read(folder / "memory.stat").splitlines()
                cached = sum(int(line.split()[1]) for line in lines if line.startswith(files))
                yield max(int(most) - max(int(taken) - cached, 0), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
