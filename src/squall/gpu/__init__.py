"""Programs on GPUs, by PyTorch: needs `squall[torch]`."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from squall.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

if importlib.util.find_spec("torch") is None:
    raise InvalidRequest("devices other than cpu need PyTorch: pip install 'squall[torch]'")


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton's kernels take it: on CUDA; anywhere while Triton interprets them."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
