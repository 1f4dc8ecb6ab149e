"""Bytes on disk to metadata and tensors. Files are untrusted: all in them is checked first."""

from __future__ import annotations

import os
from pathlib import Path

from squall.checkpoints.base import Checkpoint, Field, Header, Scalar, Tensor, TensorInfo
from squall.checkpoints.folder import open_folder, read_folder
from squall.checkpoints.ggml import is_ggml, open_ggml
from squall.checkpoints.gguf import open_gguf, read_gguf
from squall.checkpoints.inspect import Inspection, describe

__all__ = [
    "Checkpoint",
    "Field",
    "Header",
    "Inspection",
    "Scalar",
    "Tensor",
    "TensorInfo",
    "describe",
    "open_checkpoint",
    "open_gguf",
    "read_header",
]


def open_checkpoint(path: str | os.PathLike[str], *, gqa: int = 1) -> Checkpoint:
    """Open what `squall.locate` found: a GGUF file, a folder with config.json, or a GGML file.

    gqa: query heads to a KV head, which GGML files do not say.
    """
    if os.path.isdir(path):
        return open_folder(Path(path))
    return open_ggml(path, gqa=gqa) if is_ggml(path) else open_gguf(path)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Metadata and tensor table, also of number formats that Squall cannot run."""
    return read_folder(Path(path)) if os.path.isdir(path) else read_gguf(path)
