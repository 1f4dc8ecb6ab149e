"""What the README tells people to type exists and does what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import typer.main
from project import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("squall ")])
def test_commands_parse(line: str) -> None:
    from squall.cli.app import app

    group = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    command = group.get_command(None, name)  # type: ignore[attr-defined]
    assert command is not None
    command.make_context(name, arguments)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_targets_exist(line: str) -> None:
    assert line.split()[1] in TARGETS


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "python"])
def test_python_runs(text: str) -> None:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert "Paris" in done.stdout


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).is_file(), target
