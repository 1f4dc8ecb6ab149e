"""`make wheel`: an sdist, and of that a wheel for this Python; on Linux with its manylinux tag."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build(out: Path) -> tuple[Path, Path]:
    """Both files, in `out`. Compiled as a checkout is, so that ccache knows the objects."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _run("build", "--sdist", "--no-isolation", "--outdir", folder, str(ROOT))
        (sdist,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source, raw = sdist.with_name(sdist.name.removesuffix(".tar.gz")), Path(folder, "raw")
        strict = ("-C", "cmake.define.SQUALL_WERROR=ON")
        _run("build", "--wheel", "--no-isolation", *strict, "--outdir", str(raw), str(source))
        (wheel,) = raw.iterdir()
        final = Path(folder, "final")
        if sys.platform == "linux":
            _run("auditwheel", "repair", "--wheel-dir", str(final), str(wheel))
            (wheel,) = final.iterdir()
        found = (shutil.copy(path, out) for path in (sdist, wheel))
        return Path(next(found)), Path(next(found))


def _run(module: str, *arguments: str) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shared = {"CCACHE_BASEDIR": f"{arguments[-1]}/native", "CCACHE_NOHASHDIR": "1"}
    env = os.environ | shared | {"PATH": tools}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\n{module} failed")


if __name__ == "__main__":
    for path in build(ROOT / "dist"):
        sys.stdout.write(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB\n")
