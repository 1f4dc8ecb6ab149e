"""Images and workflows: linted, and what they name exists and agrees with pyproject.toml."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILES = sorted(ROOT.glob("Dockerfile*"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYTHONS = SpecifierSet(PROJECT["project"]["requires-python"])
dockerfiles = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line]


@dockerfiles
def test_hadolint_finds_nothing(path: Path) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = shutil.which("hadolint") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("there is no hadolint")
    done = subprocess.run([program, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@dockerfiles
def test_images_are_small_and_safe(path: Path) -> None:
    found = instructions(path)
    last = dict(found)
    assert [name for name, _ in found].count("FROM") == 2  # the compiler stays in the first
    assert last["USER"] == "1000"
    assert "127.0.0.1:8080/health" in last["HEALTHCHECK"]
    assert last["EXPOSE"] == "8080"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["VOLUME"] == re.findall(r"HF_HOME=(\S+)", last["ENV"])[0]
    assert {value for name, value in found if name == "ADD"} == set()


@dockerfiles
def test_images_are_made_of_what_the_sdist_has(path: Path) -> None:
    """And what the build is given is no more."""
    copied = {
        word
        for name, value in instructions(path)
        if name == "COPY" and "--from" not in value
        for word in value.split()[:-1]
    }
    excluded = PROJECT["tool"]["scikit-build"]["sdist"]["exclude"]
    assert copied == {word[2:] for word in excluded if word.startswith("!/")}
    given = (ROOT / ".dockerignore").read_text().split()
    assert copied == {word[1:] for word in given if word.startswith("!")}
    assert {word for word in copied if not (ROOT / word).exists()} == set()


@dockerfiles
def test_images_have_a_python_that_squall_runs_on(path: Path) -> None:
    versions = re.findall(r"^FROM python:([\d.]+)-slim", path.read_text(), re.MULTILINE)
    assert len(set(versions)) == 1
    assert PYTHONS.contains(versions[0])


@dockerfiles
def test_images_have_extras_that_exist(path: Path) -> None:
    extras = re.findall(r"'\.\[(\w+)\]'", path.read_text())
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


@workflows
def test_workflows_take_actions_of_a_major_version(path: Path) -> None:
    used = [step["uses"] for job in jobs(path).values() for step in job["steps"] if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action), action


@workflows
def test_workflows_may_do_little(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    allowed = {name: job["permissions"] for name, job in jobs(path).items() if "permissions" in job}
    assert allowed in ({}, {"publish": {"id-token": "write"}})  # for trusted publishing
    assert "secrets." not in path.read_text()


@workflows
def test_workflows_run_what_exists(path: Path) -> None:
    text = path.read_text()
    for job in jobs(path).values():
        needed = job.get("needs", [])
        assert set(needed) <= set(jobs(path))
        matrix = job.get("strategy", {}).get("matrix", {})
        assert all(PYTHONS.contains(version) for version in matrix.get("python", ()))
        assert {file for file in matrix.get("file", ()) if not (ROOT / file).is_file()} == set()
    for script in re.findall(r"\.ci/\w+", text):
        assert (ROOT / script).is_file()
    for target in re.findall(r"\bmake (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_wheels_are_built_for_every_python() -> None:
    """Each before the stable ABI, and the first that has it."""
    stable = PROJECT["tool"]["scikit-build"]["wheel"]["py-api"]
    supported = [minor for minor in range(30) if PYTHONS.contains(f"3.{minor}")]
    wanted = [f"cp3{minor}-*" for minor in supported if minor <= int(stable[3:])]
    assert PROJECT["tool"]["cibuildwheel"]["build"] == wanted
    assert "cibuildwheel" in (ROOT / ".github/workflows/wheels.yml").read_text()


def test_the_default_model_has_one_version() -> None:
    from squall import embedded

    for path in [*WORKFLOWS, ROOT / "Makefile"]:
        found = set(re.findall(rf"{embedded.DISTRIBUTION}==([\d.]+)", path.read_text()))
        assert found <= {embedded.VERSION}, path


def test_all_is_every_extra_without_a_server_of_its_own() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (every,) = extras["all"]
    assert set(re.findall(r"\w+", every)) - {"squall"} == set(extras) - {"all", "dev", "ray"}
