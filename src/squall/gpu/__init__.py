"""Programs on GPUs, by PyTorch: needs `squall[torch]`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton's kernels take it: on CUDA; anywhere while Triton interprets them."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
