"""GGUF files of LoRA adapters, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from squall.adapters.parts import Floats, Parts
from squall.checkpoints.base import Field
from squall.checkpoints.gguf import open_gguf
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.recipes.modules import gguf_architecture

MAX_ALPHA = 1e6
_KIND = {"general.type": "adapter", "adapter.type": "lora"}
_KEYS = {
    "adapter.type",
    *(f"adapter.lora.{key}" for key in ("alpha", "task_name", "prompt_prefix")),
}
_ENDS = (".lora_a", ".lora_b")


def read_file(path: Path, parts: Parts) -> tuple[float, tuple[str, ...]]:
    """The alpha of a file, and the tensors that it adapts; their terms go to `parts`."""
    found = open_gguf(path)
    alpha = _alpha(path, found.metadata, parts)
    stems = {n.removesuffix(end) for n in found.tensors for end in _ENDS if n.endswith(end)}
    for name, tensor in found.tensors.items():
        if not name.endswith(_ENDS):
            parts.whole(name, Floats.of(tensor))
    for stem in sorted(stems):
        if not all(stem + end in found.tensors for end in _ENDS):
            raise InvalidCheckpoint(f"{quote(path.name)} has one of {stem}.lora_a and .lora_b")
        a, b = (Floats.of(found.tensors[stem + end]) for end in _ENDS)
        if not len(a.array.shape) == len(b.array.shape) <= 3:
            raise InvalidCheckpoint(f"{quote(path.name)}: {stem} has no pair of matrices")
        a, b = (x if x.array.ndim == 3 else replace(x, array=x.array[None]) for x in (a, b))
        scale = alpha / b.array.shape[-1] if alpha else 1.0
        parts.low_rank(stem.removesuffix(".weight"), a, b, scale)
    return alpha, tuple(sorted(stems))


def _alpha(path: Path, metadata: Mapping[str, Field], parts: Parts) -> float:
    known = gguf_architecture(parts.target.architecture)
    given = {key: metadata.get(key) for key in (*_KIND, "general.architecture")}
    if given != _KIND | {"general.architecture": known} or known is None:
        raise UnsupportedModel(
            f"{quote(path.name)} has {quote(str(given))}; a LoRA of this base has "
            f"{_KIND | {'general.architecture': known}}"
        )
    more = [key for key in metadata if key.startswith("adapter.") and key not in _KEYS]
    alpha = metadata.get("adapter.lora.alpha")
    if more or not isinstance(alpha, int | float) or not 0 <= alpha <= MAX_ALPHA:
        raise UnsupportedModel(
            f"{quote(path.name)} has adapter.lora.alpha {quote(str(alpha))} and keys {more[:4]}; "
            f"alpha must be 0 to {MAX_ALPHA:g}, and there may be no others of adapters"
        )
    return float(alpha)
