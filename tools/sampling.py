"""Writes the table of docs/sampling.md from the fields of requests; with --check only compares."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from squall.engine.fields import Number, described, help_of
from squall.engine.sampling import DRY, DRY_BREAKERS, Dry, Sampling, SamplingFields

PAGE = Path(__file__).parents[1] / "docs" / "sampling.md"
BEGIN, END = "<!-- fields -->\n", "<!-- end of fields -->\n"
DEFAULTS = {
    **{f.name: f.default for f in dataclasses.fields(Sampling)},
    **{DRY + f.name: f.default for f in dataclasses.fields(Dry)},
    "seed": "random",
    "dry_multiplier": "0",
    "dry_range": "all",
    "dry_sequence_breakers": " ".join(map(repr, DRY_BREAKERS)),
}


def main() -> None:
    """Write the page, or exit with status 1 if it is not up to date."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    if sys.argv[1:] == ["--check"]:
        sys.exit(old != table())
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


def table() -> str:
    """The rows."""
    rows = ["| field | default | allowed | |", "|---|---|---|---|"]
    for name, about in described(SamplingFields).items():
        allowed = about.allowed.split(" (")[0] if isinstance(about, Number) else "a list of texts"
        rows.append(f"| `{name}` | {DEFAULTS[name]} | {allowed} | {help_of(about)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
