"""Tables and lines on standard output. No text is markup, and a pipe gets lines that are whole."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 160  # where there is no terminal


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Collection[str] = (),
    **settings: Any,
) -> Table:
    """Rows under headings, of which those of `right` have numbers; settings: of rich."""
    from rich.table import Table
    from rich.text import Text

    texts = {name: Text(text) for name, text in settings.items() if isinstance(text, str)}
    made = Table(title_justify="left", **settings | texts)
    for heading in headings:
        number = heading in right
        made.add_column(
            Text(heading), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(str(value)) for value in row))
    return made


def show(*parts: Table | str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for part in parts:
        if isinstance(part, str):
            console.print(Text(part), soft_wrap=True)
        else:
            console.print(part)
