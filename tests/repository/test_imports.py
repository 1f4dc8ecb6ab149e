"""Arrows point one way, docs/design.md says so, and `import squall` is light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from project import imports, modules
from rooms import ABOVE, BEGIN, END, MAY_IMPORT, PAGE, TOP, page, room_of


def test_arrows_point_one_way() -> None:
    allowed, wrong = MAY_IMPORT | ABOVE, []
    for path, tree in modules():
        room = room_of(path)
        if room in TOP:
            continue
        for name in imports(tree):
            target = [*name.split("."), ""][1]
            if target not in allowed[room] | {room}:
                wrong.append(f"{path} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_guide_names_every_file_once() -> None:
    text = PAGE.read_text()
    assert text == page(), "run `make docs`"
    folder, found = Path(), []
    for line in text.split(BEGIN)[1].split(END)[0].splitlines():
        if heading := re.match(r"\*\*`(\w+)/`\*\* \w", line):
            folder = Path(heading[1])
            found.append(folder / "__init__.py")
        elif entry := re.match(r"- `(\w+\.py)` \S", line):
            found.append(folder / entry[1])
    assert sorted(found) == sorted(path for path, _ in modules())


def test_import_is_light() -> None:
    code = (
        "import sys, squall; squall.Model; squall.Runner; "
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'gguf', "
        "'rich', 'prompt_toolkit', 'typer', 'huggingface_hub', 'fastapi', 'starlette', "
        "'uvicorn', 'pydantic', 'prometheus_client', 'httpx', 'PIL'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
