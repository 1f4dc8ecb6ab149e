"""What adapters call the parts of a model, and in which order they have the rows of q and k."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from squall.recipes import config, gguf
from squall.recipes.config_names import USUAL
from squall.recipes.gguf_parts import NAMING
from squall.recipes.gguf_write import ARCHITECTURES, INTERLEAVED
from squall.recipes.names import Naming
from squall.spec import Decoder

_UNIT_OFFSET = ("gemma", "gemma2", "gemma3")
# Experts and router as transformers has them since version 5, in all models.
_STACKED = replace(
    USUAL,
    fused={
        **USUAL.fused,
        "mlp.experts.gate_up_proj": ("feed_forward.experts.gate", "feed_forward.experts.up"),
        "mlp.experts.down_proj": ("feed_forward.experts.down",),
        "mlp.router": ("feed_forward.router",),
    },
)
# Of a module of stacked experts, in the order in which transformers has them.
PARAMETERS = ("gate_up_proj", "down_proj")


def namings(architecture: str) -> tuple[Naming, ...]:
    """How adapters may call the modules of a model, whatever file it came from."""
    if architecture in gguf.RECIPES:
        classes = [name for name, written in ARCHITECTURES.items() if written == architecture]
    else:
        classes = [architecture]
    own = [config.RECIPES[name].naming for name in classes]
    return (*(naming for i, naming in enumerate(own) if naming not in own[:i]), _STACKED, NAMING)


def gguf_architecture(architecture: str) -> str | None:
    """What GGUF calls an architecture; None: it does not know it."""
    return architecture if architecture in gguf.RECIPES else ARCHITECTURES.get(architecture)


def are_paired(architecture: str) -> bool:
    """Whether a file of an architecture has rows of q and k as rotated pairs, not as halves."""
    return architecture in INTERLEAVED


def norm_offset(architecture: str) -> float:
    """What norms have in GGUF files that they have not in transformers."""
    return 1.0 if architecture in _UNIT_OFFSET else 0.0


def pairs(decoder: Decoder, layer: int, rows: int) -> NDArray[np.intp]:
    """Where rows of q or k are in halves that are now in pairs."""
    attention = decoder.layers[layer].attention
    ropes = (each.attention.rope for each in decoder.layers)
    # Layers without rope are permuted like the others.
    rope = attention.rope or next((found for found in ropes if found is not None), None)
    dims = attention.head_dim if rope is None else rope.dims
    head = np.arange(attention.head_dim)
    head[:dims] = np.arange(dims).reshape(2, -1).T.reshape(-1)
    return (np.arange(0, rows, attention.head_dim)[:, None] + head).reshape(-1)
