"""Arrows point one way, and `import squall` is light."""

from __future__ import annotations

import subprocess
import sys

from project import imports, modules

# Room -> the rooms it may import. A room is a module or a folder right below squall.
MAY_IMPORT = {
    "errors": set(),
    "spec": set(),
    "batch": set(),
    "program": {"spec"},
    "roles": {"spec"},
    "quant": {"errors", "_native"},
    "checkpoints": {"errors", "quant"},
    "recipes": {"errors", "spec", "roles", "program", "checkpoints"},
    "weights": {"errors", "program", "checkpoints", "quant"},
    "convert": {
        "errors", "spec", "roles", "program", "checkpoints", "recipes", "quant", "text", "weights",
        "_native",
    },
    "decoder": {"errors", "spec", "roles", "program"},
    "executors": {
        "errors", "spec", "program", "batch", "quant", "checkpoints", "weights", "_native",
    },
    "text": {"errors"},
    "engine": {"errors", "spec", "batch", "text", "_native"},
    "embedded": {"errors"},
    "opening": {"errors", "checkpoints", "engine", "quant"},
    "locate": {"errors", "embedded", "checkpoints"},
    "measure": {
        "errors", "batch", "quant", "recipes", "decoder", "checkpoints", "executors", "engine",
        "locate", "_native",
    },
}  # fmt: skip
# Above the model: its command line and servers, and what both of them and users ask.
ABOVE = {
    "api": {"errors", "checkpoints", "engine", "quant", "text", "opening", "model"},
    "server": {"__version__", "errors", "engine", "model", "api"},
    "load": {"errors", "engine", "model"},
}
TOP = {"model", "cli", "__init__", "__main__"}


def test_arrows_point_one_way() -> None:
    wrong = []
    for path, tree in modules():
        room = path.parts[0].removesuffix(".py")
        if room in TOP - {"model"}:
            continue
        allowed = MAY_IMPORT.keys() if room == "model" else (MAY_IMPORT | ABOVE)[room]
        for name in imports(tree):
            target = [*name.split("."), ""][1]
            if target not in allowed | {room}:
                wrong.append(f"{path} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_import_is_light() -> None:
    code = (
        "import sys, squall; squall.Model; squall.Runner; "
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'gguf', "
        "'rich', 'prompt_toolkit', 'typer', 'huggingface_hub', 'fastapi', 'starlette', "
        "'uvicorn', 'pydantic', 'prometheus_client', 'httpx'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
