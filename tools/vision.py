"""Writes the table of docs/vision.md from the families of models; with --check only compares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from squall.recipes import config
from squall.vision.families import FAMILIES, llava
from squall.vision.llava import Llava
from squall.vision.pixtral import Pixtral

PAGE = Path(__file__).parents[1] / "docs" / "vision.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
# What "low" means, by a field that a family has.
LOW = {
    "split": "not split", "pinpoints": "the fewest tiles", "crops": "one crop",
    "max_edge": "an edge of 512", "most": "an edge of 512",
}  # fmt: skip


def main() -> None:
    """Write the page, or exit with status 1 if it is not up to date."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    old, _, after = rest.partition(END)
    if sys.argv[1:] == ["--check"]:
        sys.exit(old != table())
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


def table() -> str:
    """The rows."""
    rows = ["| `--arch` | placeholder | tokens of an image | `low` |", "|---|---|---|---|"]
    arch = {main_class: name for name, main_class in config.NAMES.items()}
    names: dict[type, list[str]] = {}
    for main_class in FAMILIES:
        for family in kinds(main_class):
            also = " (Pixtral)" * (family is Pixtral and main_class.startswith("Llava"))
            names.setdefault(family, []).append(f"`{arch[main_class]}`{also}")
    for family, known in names.items():
        given = {field.name: field.default for field in fields(family)}
        low = next((what for name, what in LOW.items() if name in given), "")
        placeholder = str(given["placeholder"]).replace("|", "\\|").replace("{}", "1")
        low = "" if family is Llava else low
        rows.append(f"| {', '.join(known)} | `{placeholder}` | {given['cost']} | {low} |")
    return "\n".join(rows) + "\n"


def kinds(main_class: str) -> Iterator[type]:
    """The classes of a family, of which LLaVA has one for each of its towers."""
    made = FAMILIES[main_class]
    if made is llava:
        yield from (Llava, Pixtral)
    else:
        yield getattr(made, "func", made).__self__


if __name__ == "__main__":
    main()
