"""Line budgets: a room that outgrows its budget is to be thought about, then the number changed."""

from __future__ import annotations

import ast
import re
from collections import Counter
from itertools import chain
from pathlib import Path

from project import ROOT, modules

BUDGETS = {
    "src/squall/adapters": 1989,
    "src/squall/api": 2286,
    "src/squall/checkpoints": 2858,
    "src/squall/cli": 4127,
    "src/squall/convert": 1013,
    "src/squall/diffusion": 1710,
    "src/squall/embeddings": 1040,
    "src/squall/engine": 2793,
    "src/squall/executors": 1702,
    "src/squall/gpu": 3396,
    "src/squall/quant": 994,
    "src/squall/recipes": 4050,
    "src/squall/server": 5293,
    "src/squall/text": 3725,
    "src/squall/vision": 2191,
    "native": 9095,
}
P95_LINES = 40
MOST_LINES = 60
ALIKE = 6
MOST_PAIRS = 6
SKIPPED = re.compile(r"#|from \S+ import|import ")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_folders_keep_their_budget() -> None:
    lines: Counter[str] = Counter()
    for path in chain((ROOT / "src/squall").rglob("*.py"), (ROOT / "native").glob("*.[hc]*")):
        for folder in BUDGETS:
            if (ROOT / folder) in path.parents:
                lines[folder] += len(path.read_text().splitlines())
    over = {folder: lines[folder] for folder in BUDGETS if lines[folder] > BUDGETS[folder]}
    assert not over, f"over budget: {over}"


def test_functions_fit_a_screen() -> None:
    sizes = sorted(
        ((node.end_lineno or 0) - node.lineno + 1, f"{path}: {node.name}")
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    )
    assert sizes[-1][0] <= MOST_LINES, sizes[-1]
    assert sizes[len(sizes) * 95 // 100][0] <= P95_LINES


def _lines(path: Path) -> list[str]:
    """What counts: no blank lines, comments, imports, or punctuation alone."""
    found = (line.strip() for line in path.read_text().splitlines())
    return [line for line in found if re.search(r"\w", line) and not SKIPPED.match(line)]


def test_little_stands_twice() -> None:
    """Pairs of places that share six lines and more; a longer run counts once."""
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = {}
    pairs = []
    for path in sorted((ROOT / "src/squall").rglob("*.py")):
        lines = _lines(path)
        for start in range(len(lines) - ALIKE + 1):
            run = tuple(lines[start : start + ALIKE])
            for other, at in places.get(run, []):
                if (other, at - 1, path, start - 1) not in pairs:
                    pairs.append((other, at, path, start))
                else:
                    pairs[pairs.index((other, at - 1, path, start - 1))] = (other, at, path, start)
            places.setdefault(run, []).append((path, start))
    told = [f"{a.relative_to(ROOT)} ~ {b.relative_to(ROOT)}" for a, _, b, _ in pairs]
    assert len(pairs) <= MOST_PAIRS, "\n".join(told)
