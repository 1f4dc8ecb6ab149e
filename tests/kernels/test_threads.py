"""How many threads run by default: floor(min(affinity, cgroup quota)), as containers limit them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from squall import _native

pytestmark = pytest.mark.serial  # quotas are told from more than one CPU
ALLOWED = len(os.sched_getaffinity(0))


def machine(root: Path, groups: str, files: dict[str, str]) -> str:
    """A tree with /proc/self/cgroup and files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "199999 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),  # less than one CPU: still one thread
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "100000 100000"}, 1),
        ("0::/a\n", {"a/cpu.max": "99900000 100000"}, None),
        (
            "4:cpu,cpuacct:/d\n0::/\n",
            {
                "cpu,cpuacct/d/cpu.cfs_quota_us": "150000",
                "cpu,cpuacct/d/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        ("4:cpu,cpuacct:/d\n", {"cpu,cpuacct/d/cpu.cfs_quota_us": "-1"}, None),
        ("nonsense\n1:\n0::a\n", {"cpu.max": "\n"}, None),
        ("0::/\n", {"cpu.max": "many 100000"}, None),
    ],
)
def test_row_25_quota(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    threads, why = _native.default_threads(machine(tmp_path, groups, files))
    assert threads == (ALLOWED if limit is None else min(limit, ALLOWED))
    assert ("quota" in why) == (limit is not None and limit < ALLOWED)


def test_row_25_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from squall import _native; print(_native.default_threads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(1, ")
