"""The rooms of src/squall: what each may import, and docs/design.md's part about them.

python tests/repository/rooms.py: write that part anew.
"""

from __future__ import annotations

import ast
from pathlib import Path

from project import PACKAGE, ROOT, modules

# Room -> the rooms it may import. A room is a module or a folder right below squall.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "closing": set(),
    "files": {"errors"},
    "machine": set(),
    "spec": set(),
    "program": {"spec"},
    "batch": {"program"},
    "roles": {"spec"},
    "blocks": {"spec", "roles", "program"},
    "decoder": {"errors", "spec", "roles", "program", "blocks"},
    "encoder": {"spec", "roles", "program", "blocks"},
    "quant": {"errors", "_native"},
    "checkpoints": {"errors", "files", "quant"},
    "recipes": {"errors", "files", "spec", "roles", "program", "checkpoints"},
    "weights": {"errors", "program", "checkpoints", "quant"},
    "executors": {"errors", "machine", "program", "batch", "quant", "weights", "gpu", "_native"},
    "gpu": {
        "errors", "machine", "spec", "program", "batch", "quant", "weights", "executors", "_native",
    },
    "adapters": {
        "errors", "files", "spec", "roles", "program", "batch", "checkpoints", "recipes", "quant",
        "weights", "decoder", "executors",
    },
    "text": {"errors", "files", "machine"},
    "convert": {
        "errors", "files", "spec", "roles", "program", "checkpoints", "recipes", "quant", "text",
        "weights", "adapters", "_native",
    },
    "vision": {
        "errors", "files", "spec", "roles", "program", "blocks", "batch", "checkpoints", "recipes",
        "quant", "weights", "executors", "text", "engine",
    },
    "engine": {
        "errors", "closing", "files", "machine", "spec", "batch", "executors", "text", "_native",
    },
    "diffusion": {
        "errors", "closing", "files", "spec", "roles", "program", "blocks", "encoder",
        "checkpoints", "recipes", "quant", "weights", "executors", "text", "vision", "opening",
        "locate", "names", "_native",
    },
    "embeddings": {
        "errors", "closing", "files", "spec", "program", "batch", "encoder", "checkpoints",
        "recipes", "quant", "weights", "executors", "text", "opening", "locate",
    },
    "embedded": {"errors"},
    "opening": {"errors", "adapters", "checkpoints", "engine", "executors", "quant"},
    "names": {"errors", "files", "embedded", "checkpoints"},
    "locate": {"errors", "embedded", "checkpoints", "names"},
    "measure": {
        "errors", "batch", "quant", "recipes", "decoder", "checkpoints", "weights", "executors",
        "engine", "locate", "_native",
    },
}  # fmt: skip
# From here on what users meet: the model, what is asked of it, its server and its commands.
ABOVE: dict[str, set[str]] = {
    "assembly": set(MAY_IMPORT) - {"measure"},
    "tuning": {
        "errors", "assembly", "decoder", "engine", "executors", "machine", "measure", "opening",
        "program", "quant", "weights",
    },
    "needs": {
        "errors", "assembly", "checkpoints", "decoder", "diffusion", "engine", "executors",
        "locate", "opening",
    },
    "model": {
        "errors", "closing", "adapters", "assembly", "engine", "executors", "opening", "program",
        "quant", "spec", "text", "vision", "weights",
    },
    "about": {
        "errors", "assembly", "checkpoints", "embeddings", "engine", "locate", "model", "needs",
        "opening", "quant", "recipes", "spec", "text",
    },
    "api": {
        "errors", "closing", "checkpoints", "adapters", "engine", "quant", "text", "opening",
        "model", "diffusion",
    },
    "mcp": {"errors", "closing", "text"},
    "server": {
        "__version__", "errors", "about", "adapters", "api", "checkpoints", "diffusion",
        "embeddings", "engine", "executors", "machine", "mcp", "model", "needs", "opening",
        "quant", "text", "vision",
    },
    "load": {"errors", "engine", "model"},
    "tools": {"errors", "model", "api", "mcp"},
}  # fmt: skip
TOP = {"cli", "__init__", "__main__"}

PAGE = ROOT / "docs/design.md"
BEGIN, END = "<!-- from here on `make docs` writes -->", "<!-- to here -->"


def room_of(path: Path) -> str:
    """The room of a file, by its path within the package."""
    return path.parts[0].removesuffix(".py")


def page() -> str:
    """docs/design.md as it should be."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{_table()}\n{_files()}\n{END}{after}"


def _table() -> str:
    rows = ["| room | may import |", "| --- | --- |"]
    for room, others in (MAY_IMPORT | ABOVE).items():
        # What everything may use need not be said.
        named = sorted(others - {"errors", "_native", "__version__"})
        said = "all of these" if room == "assembly" else ", ".join(named)
        rows.append(f"| `{_shown(room)}` | {said} |")
    return "\n".join([*rows, f"| `{_shown('cli')}` | anything |", ""])


def _shown(room: str) -> str:
    return f"{room}/" if (PACKAGE / room).is_dir() else f"{room}.py"


def _files() -> str:
    """Every file once, with the first sentence of its docstring."""
    lines: list[str] = []
    folder = Path()
    for path, tree in sorted(modules(), key=lambda found: (found[0].parent, found[0])):
        if path.parent != folder:
            folder = path.parent
            lines += ["", f"**`{folder}/`** {_says(folder / '__init__.py')}", ""]
        if folder == Path() or path.name != "__init__.py":
            lines.append(f"- `{path.name}` {_first_sentence(tree)}")
    return "\n".join(lines)


def _says(path: Path) -> str:
    return _first_sentence(ast.parse((PACKAGE / path).read_text()))


def _first_sentence(tree: ast.Module) -> str:
    text = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return text.split(". ")[0].rstrip(".") + "."


if __name__ == "__main__":
    PAGE.write_text(page())
