"""The bar that tells how far a long load is."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys

import pytest

from squall.cli import options

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(
    stderr: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    then: type[BaseException] | None = None,
    **how: bool,
) -> str:
    """What is on `stderr` when half of the work was done after `seconds`, and then all of it."""
    now_s = 100.0
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(options.time, "monotonic", lambda: now_s)
    with contextlib.suppress(KeyboardInterrupt), options.progress("loading", **how) as show:
        now_s += seconds
        show(500, 1000)
        if then is not None:
            raise then
        show(1000, 1000)
    return stderr.getvalue()


def test_a_long_load_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch, 60)
    assert re.search(r"loading.*\b50%.*loading.*100%", text, re.DOTALL)
    assert text.rindex(SHOW) > text.rindex(HIDE)


def test_a_download_has_bytes_and_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch, 60, sizes=True)
    # The rate is not known yet, as the clock stands.
    assert re.search(r"loading.*0\.5/1\.0 kB.*1\.0/1\.0 kB\S* \S*\?", text, re.DOTALL)


def test_a_short_load_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(Terminal(), monkeypatch, 0.1) == ""


def test_only_a_terminal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch, 60) == ""


def test_an_interrupt_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch, 60, KeyboardInterrupt)
    assert "loading" in text
    assert text.rindex(SHOW) > text.rindex(HIDE)


def test_an_interrupt_before_a_command_begins_is_no_traceback() -> None:
    code = """
import signal, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "squall.cli.run":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
from squall.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")
