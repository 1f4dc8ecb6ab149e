"""What a shell offers where a model is named; with nothing offered it completes files itself."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable

from squall.errors import SquallError

# bash takes a name with a colon for several words.
_SPLIT = re.compile(r"(\S+) :(?: \S*)?$")


def complete_known(incomplete: str) -> list[str]:
    """Short names and models that are here, and files that begin so, too."""
    from squall import names

    found = _offered(lambda: [*names.known(), *_installed()], incomplete)
    files = glob.glob(f"{glob.escape(incomplete)}*") if found and incomplete else []
    models = [file for file in files if os.path.isdir(file) or file.endswith((".gguf", ".uqff"))]
    return [*found, *models]


def complete_local(incomplete: str) -> list[str]:
    """Models that are here."""
    return _offered(_installed, incomplete)


def _installed() -> list[str]:
    from squall import names

    return [model.name for model in names.installed()]


def _offered(models: Callable[[], list[str]], incomplete: str) -> list[str]:
    split = _SPLIT.search(os.environ.get("COMP_WORDS", ""))
    before = f"{split[1]}:" if split else ""
    begin = before + incomplete.removeprefix(":")
    try:
        found = {name.removeprefix(before) for name in models() if name.startswith(begin)}
    except (SquallError, OSError):  # of the user's table, which the command itself tells
        return []
    return sorted(found)
