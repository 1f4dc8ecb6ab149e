"""Tables and lines as they come out of a pipe."""

from __future__ import annotations

import pytest

from squall.cli.tables import show, table


def test_nothing_is_markup_and_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("m[red].gguf", 1), ("[/]", 22)]
    line = "[/b] " + "word " * 60
    show(line, table(("a[b]", "n"), rows, ("n",), title="[/] title", caption="[x] caption"))
    lines = [text.strip() for text in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [line.strip(), "[/] title"]
    assert lines[-1] == "[x] caption"
    for row in ("┃ a[b]        ┃  n ┃", "│ m[red].gguf │  1 │", "│ [/]         │ 22 │"):
        assert row in lines
