"""What the site has beside docs/: examples, the change log, and links to both."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changelog.md", "examples/README.md": "examples/index.md"}
# In the repository -> in the site.
URIS = {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")} | PAGES
URIS |= {
    (name := path.relative_to(ROOT).as_posix()): f"{name}.md"
    for path in sorted((ROOT / "examples").rglob("*"))
    if path.suffix in (".py", ".ipynb", ".toml", ".json")
}
SOURCES = {uri: source for source, uri in URIS.items()}
LINK = re.compile(r"\]\(([\w./-]+)(#[\w-]+)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """With pages of what is not in docs/."""
    for source, uri in URIS.items():
        if not source.startswith("docs/"):
            page = File.generated(config, uri, content=_page(ROOT / source))
            page.inclusion = (
                InclusionLevel.INCLUDED if source in PAGES else InclusionLevel.NOT_IN_NAV
            )
            files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """With links that are right in the repository made right in the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(SOURCES[here])

    def moved(link: re.Match[str]) -> str:
        uri = URIS.get(posixpath.normpath(posixpath.join(folder, link[1])), link[1])
        if uri == link[1]:
            return link[0]
        return f"]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{link[2] or ''})"

    return LINK.sub(moved, markdown)


def _page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    language = {".py": "python"}.get(path.suffix, path.suffix[1:])
    return f"# {path.name}\n\n```{language}\n{text}```\n"


def _cell(cell: dict[str, object]) -> str:
    text = "".join(cell["source"])  # type: ignore[arg-type]
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
