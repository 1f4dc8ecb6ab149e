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
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README)
PICTURES = BLOCK.findall((ROOT / "docs/diffusion.md").read_text())  # whose models are large
LINES = [line for kind, text in BLOCKS + PICTURES if kind == "sh" for line in text.splitlines()]
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("line", [line for line in LINES if re.match("squall(-server)? ", line)])
def test_commands_parse(line: str) -> None:
    from squall.cli.app import app
    from squall.cli.serve import server

    name, *arguments = shlex.split(line)
    command = typer.main.get_command(server if name == "squall-server" else app)
    while arguments and hasattr(command, "commands"):
        at = next((i for i, word in enumerate(arguments) if word in command.commands), None)
        if at is None:
            break
        command.make_context(name, arguments[: at + 1])
        name, command = arguments[at], command.get_command(None, arguments[at])
        arguments = arguments[at + 1 :]
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
