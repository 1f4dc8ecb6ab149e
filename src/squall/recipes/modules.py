"""What adapters call the parts of a model, and what GGUF files have otherwise than transformers."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from squall.recipes import config, gguf
from squall.recipes.config_names import USUAL
from squall.recipes.gguf_parts import NAMING
from squall.recipes.gguf_write import ARCHITECTURES, INTERLEAVED
from squall.recipes.names import Naming
from squall.spec import Decoder

# Whose norms have their 1 in GGUF files.
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
# What names of towers and connectors begin with, in one version or another.
OUTER = re.compile(
    r"^(model\.)?(vision_tower\.|vision_model\.|visual\.|vision_embed_tokens\.img_processor\.)*"
)
# What is adapted without a module of its own, in the order in which it is wrapped.
PARAMETERS = ("gate_up_proj", "down_proj", "weight")


def inner(naming: Naming) -> Naming:
    """The names of a tower without what they begin with."""
    stems = {role: OUTER.sub("", name) for role, name in naming.stems.items()}
    fused = {OUTER.sub("", name): stems for name, stems in naming.fused.items()}
    return replace(naming, stems=stems, fused=fused, layer=OUTER.sub("", naming.layer))


def gguf_architecture(architecture: str) -> str | None:
    """What GGUF calls an architecture; None: it does not know it."""
    return architecture if architecture in gguf.RECIPES else ARCHITECTURES.get(architecture)


def namings(architecture: str) -> tuple[Naming, ...]:
    """How adapters may call the modules of a model, whatever file it came from."""
    classes = [name for name, written in ARCHITECTURES.items() if written == architecture]
    known = (name for name in classes or [architecture] if name in config.RECIPES)
    own = [config.RECIPES[name].naming for name in known]
    return (*own, _STACKED, NAMING)


def norm_offset(architecture: str | None) -> float:
    """What the norms of a GGUF file have that those of transformers have not."""
    return 1.0 if architecture in _UNIT_OFFSET else 0.0


def row_order(architecture: str | None, decoder: Decoder, role: str) -> NDArray[np.intp] | None:
    """Where the rows that a GGUF file has come from; None: they lie as in transformers.

    Those of q and k may be rotated in pairs: of each head the first `dims` were two halves. Layers
    without rope have the same order.
    """
    if architecture not in INTERLEAVED or not role.endswith((".attention.q", ".attention.k")):
        return None
    attention = decoder.layers[int(role.split(".")[1])].attention
    ropes = (layer.attention.rope for layer in decoder.layers)
    dims = next((rope.dims for rope in (attention.rope, *ropes) if rope), attention.head_dim)
    head = np.arange(attention.head_dim)
    head[:dims] = np.arange(dims).reshape(2, -1).T.reshape(-1)
    heads = attention.heads if role.endswith("q") else attention.kv_heads
    return (np.arange(heads)[:, None] * len(head) + head).reshape(-1)
