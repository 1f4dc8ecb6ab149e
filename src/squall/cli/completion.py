"""What a shell offers where a model is named; with nothing offered it completes files itself."""

from __future__ import annotations

import glob
import os
import re

from squall import names
from squall.errors import SquallError

# bash takes a name with a colon for several words.
_SPLIT = re.compile(r"(\S+) :(?: \S*)?$")


def complete_known(incomplete: str) -> list[str]:
    """Short names and models that are here, and files that begin so, too."""
    found = _offered({*_known(), *complete_local(incomplete)}, incomplete)
    files = glob.glob(f"{glob.escape(incomplete)}*") if found and incomplete else []
    models = [file for file in files if os.path.isdir(file) or file.endswith((".gguf", ".uqff"))]
    return sorted({*found, *models})


def complete_local(incomplete: str) -> list[str]:
    """Models that are here."""
    try:
        return _offered({model.name for model in names.installed()}, incomplete)
    except (SquallError, OSError):
        return []


def _known() -> set[str]:
    try:
        return {*names.known()}
    except SquallError:
        return set()


def _offered(models: set[str], incomplete: str) -> list[str]:
    split = _SPLIT.search(os.environ.get("COMP_WORDS", ""))
    before = f"{split[1]}:" if split else ""
    begin = before + incomplete.removeprefix(":")
    return sorted(name.removeprefix(before) for name in models if name.startswith(begin))
