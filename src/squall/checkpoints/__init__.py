"""Bytes on disk to metadata and tensors. Files are untrusted: all in them is checked first."""

from squall.checkpoints.base import Checkpoint, Field, Header, Scalar, Tensor, TensorInfo
from squall.checkpoints.gguf import open_gguf, read_header
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
    "open_gguf",
    "read_header",
]
