"""A file as bytes that the system brings in when they are read."""

from __future__ import annotations

import os
import stat
from mmap import ACCESS_READ, mmap
from pathlib import Path

from squall.errors import ModelNotFound

Buffer = mmap | bytes


def map_file(path: Path, advice: str = "give the path of a .gguf file") -> Buffer:
    """Map a regular file read-only; raises ModelNotFound with `advice` for anything else."""
    try:
        kind = os.stat(path).st_mode
        # Before opening: to open a pipe blocks.
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "not a regular file"
            raise ModelNotFound(f"{str(path)!r} is {what}; {advice}")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFound(f"there is no file {str(path)!r}") from None
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"cannot read {str(path)!r}: {error}") from None
