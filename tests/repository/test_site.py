"""The site: built without a warning, every page in its menu, nothing loaded from elsewhere."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from project import ROOT

OUTSIDE = re.compile(r'<(?:script|link|img|iframe)[^>]* (?:src|href)="https?://[^"]*"')
SEEN = ("index", "serving", "examples/index", "examples/cookbook.ipynb", "changelog")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built; a page that is missing from the menu, or a link to nothing, is a warning too."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("mkdocs")
    log.addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_MKDOCS_2_WARNING", "1")
            build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    finally:
        log.removeHandler(handler)
    assert not warnings
    return folder


def test_pages_are_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | set(SEEN)
    assert {page for page in pages if not (site / f"{page}.html").is_file()} == set()
    assert (site / "search/search_index.json").is_file()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not OUTSIDE.findall(page.read_text(encoding="utf-8")), page


def test_the_first_page_tells_of_all_others() -> None:
    first = (ROOT / "docs/index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {page for page in pages if f"]({page})" not in first} == set()
