"""The interactive chat: over a pipe line by line, and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import squall

OPTIONS = ("run", "--context", "1024", "--temperature", "0")


def chat(*lines: str, options: tuple[str, ...] = ()) -> str:
    done = squall(*OPTIONS, *options, stdin="\n".join([*lines, ""]))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_history_is_kept_and_not_read_again() -> None:
    lines = "My name is Ada. Say hello.\nWhat is my name?\n"
    done = squall(*OPTIONS, "--max-tokens", "40", stdin=lines)
    first, second = re.findall(r"\[(\d+) prompt tokens.*?(?:\((\d+) known\))?;", done.stderr)
    assert int(second[0]) > int(first[0])
    assert int(second[1]) >= int(first[0])


def test_commands() -> None:
    out = chat("\\help", "\\system Be brief.", "\\nonsense", "\\clear", "\\exit", "Hi")
    assert "\\system TEXT" in out
    assert "system message set" in out
    assert "unknown command \\nonsense" in out
    assert out.count("\n") == len(out.splitlines())


def test_an_answer_cut_by_length_ends_in_dots() -> None:
    assert chat("Tell me a story.", options=("--max-tokens", "5")).rstrip().endswith("...")


def test_a_conversation_that_is_too_long_goes_on_after_clear() -> None:
    out = chat(
        "word " * 2000, "\\clear", "What is the capital of France, and what is it known for?"
    )
    assert "\\clear begins anew" in out
    assert "Paris" in out


# What the line editor sends when it begins to wait for a line, and when it has one.
PROMPT, ANSWER = "\x1b[?2004h", "\x1b[?2004l"


class Terminal:
    """`squall run` on a pseudo-terminal."""

    def __init__(self, folder: Path) -> None:
        self.output = ""
        master, slave = pty.openpty()
        self._master = master
        self.process = subprocess.Popen(
            [sys.executable, "-m", "squall", *OPTIONS],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Who is started in the background ignores it, and would hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(folder)},
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Read until `text` comes; what came before it is forgotten."""
        stop_s = time.monotonic() + seconds
        while text not in self.output:
            ready, _, _ = select.select([self._master], [], [], stop_s - time.monotonic())
            assert ready, f"no {text!r} in {self.output!r}"
            self.output += os.read(self._master, 65536).decode(errors="replace")
        self.output = self.output.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("Write a long story about a ship, with many chapters.\r")
    terminal.wait_for(ANSWER)
    terminal.wait_for(" ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("^C")
    terminal.wait_for(PROMPT)
    terminal.type("What is the capital of France, and what is it known for?\r")
    terminal.wait_for(ANSWER)
    terminal.wait_for("Paris")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for(PROMPT)
    terminal.type("\\exit\r")
    assert terminal.process.wait(30) == 0


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
