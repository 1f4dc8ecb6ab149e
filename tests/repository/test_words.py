"""What a file may say: architectures are for recipes, and the repository is about the project."""

from __future__ import annotations

import re
import subprocess

import pytest
from project import PACKAGE, ROOT

from squall import recipes

# Paths of one machine, and hosts of package registries: both are for whoever runs this to choose.
STRANGE = re.compile(r"/wor[k]/|/roo[t]/|/hom[e]/\w|\bpypi[.]org|pythonhosted[.]org|debian[.]org")
# Tokenizer kinds in GGUF files have names such as "llama", whatever the architecture; files from
# before GGUF have no other.
MAY_NAME = {"families.py", "recipes", "text", "ggml.py"}


@pytest.mark.parametrize("architecture", recipes.KNOWN)
def test_architectures_are_named_in_recipes_only(architecture: str) -> None:
    word = re.compile(
        rf"(?<![\w-]){re.escape(architecture)}(?![\w-]|\.cpp)"
    )  # the program is no architecture
    wrong = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if not MAY_NAME & set(path.parts) and word.search(path.read_text())
    ]
    assert not wrong


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_repository_speaks_of_the_project_alone() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wrong = []
    for name in listed.stdout.splitlines():
        text = (ROOT / name).read_text(errors="ignore") if (ROOT / name).is_file() else ""
        wrong += [f"{name}: {found[0]}" for found in STRANGE.finditer(text)]
    assert not wrong, "\n".join(wrong)
