"""docs/testing.md: its commands and folders exist, and it lists all that is longer by night."""

from __future__ import annotations

import re

from project import ROOT

TESTS = ROOT / "tests"
PAGE = (ROOT / "docs" / "testing.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
# Asks for the fixture, has the mark, or takes its numbers from the profile of Hypothesis.
NIGHTLY = re.compile(r"\bnightly: bool|mark\.nightly|settings\.default\.|load_profile\(")


def test_targets_exist() -> None:
    for target in re.findall(r"`make (\w+)`", PAGE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_paths_exist() -> None:
    for path in re.findall(r"\btests/[\w/]+(?:\.py)?", PAGE):
        assert (ROOT / path).exists(), path


def test_every_folder_is_named() -> None:
    for folder in {path.parent.name for path in TESTS.glob("*/test_*.py")}:
        assert re.search(rf"`(tests/)?{folder}`", PAGE), folder


def test_all_that_is_longer_by_night_is_listed() -> None:
    files = {
        str(p.relative_to(TESTS)) for p in TESTS.rglob("*.py") if NIGHTLY.search(p.read_text())
    }
    listed = set(re.findall(r"^\|[^|]+\| `([\w/.]+)` \|", PAGE, re.MULTILINE))
    assert listed == files
