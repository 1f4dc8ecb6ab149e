"""Bytes on disk to metadata and tensors. Files are untrusted: all in them is checked first."""

from __future__ import annotations

import os
from pathlib import Path

from squall.checkpoints.base import Checkpoint, Field, Scalar, Tensor
from squall.checkpoints.folder import open_file, open_folder, read_folder
from squall.checkpoints.ggml import is_ggml, open_ggml
from squall.checkpoints.gguf import open_gguf, read_gguf
from squall.checkpoints.inspect import Inspection, describe
from squall.checkpoints.uqff import SUFFIX as UQFF
from squall.checkpoints.uqff import open_uqff

__all__ = [
    "UQFF",
    "Checkpoint",
    "Field",
    "Inspection",
    "Scalar",
    "Tensor",
    "describe",
    "open_checkpoint",
    "open_file",
    "open_gguf",
    "open_uqff",
    "read_header",
]


def open_checkpoint(path: str | os.PathLike[str], *, gqa: int = 1) -> Checkpoint:
    """Open what `squall.locate` found: a GGUF, UQFF or GGML file, or a folder with config.json.

    gqa: query heads to a KV head, which GGML files do not say.
    """
    if os.path.isdir(path):
        return open_folder(Path(path))
    if Path(path).suffix == UQFF:
        return open_uqff(Path(path))
    return open_ggml(path, gqa=gqa) if is_ggml(path) else open_gguf(path)


def read_header(path: str | os.PathLike[str]) -> Checkpoint:
    """The same to look at, also of number formats and quantizations that Squall cannot run."""
    if os.path.isdir(path):
        return read_folder(Path(path))
    return open_checkpoint(path) if Path(path).suffix == UQFF or is_ggml(path) else read_gguf(path)
