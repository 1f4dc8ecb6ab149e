"""GGUF files of LoRA adapters."""

from __future__ import annotations

from pathlib import Path

from squall.adapters.parts import Parts, array_of
from squall.checkpoints.gguf import open_gguf
from squall.errors import UnsupportedModel
from squall.files import quote

MAX_ALPHA = 1e6
_KEYS = {
    "adapter.type",
    "adapter.lora.alpha",
    "adapter.lora.task_name",
    "adapter.lora.prompt_prefix",
}


def read_file(path: Path, parts: Parts) -> tuple[float, tuple[str, ...]]:
    """The alpha of a file, and the tensors that it adapts; their terms go to `parts`."""
    found = open_gguf(path)
    alpha, keys = found.metadata.get("adapter.lora.alpha"), ("general.type", "adapter.type")
    kind = *(found.metadata.get(key) for key in keys), found.metadata.get("general.architecture")
    more = sorted(key for key in found.metadata if key.startswith("adapter.") and key not in _KEYS)
    if (
        kind != ("adapter", "lora", parts.target.gguf)
        or more
        or not (isinstance(alpha, int | float) and 0 <= alpha <= MAX_ALPHA)
    ):
        raise UnsupportedModel(
            f"{quote(path.name)} is {quote(str(kind))} with alpha {quote(str(alpha))} and keys "
            f"{more[:4]}; it must be an adapter, lora, of {parts.target.gguf}, with "
            f"adapter.lora.alpha 0 to {MAX_ALPHA:g} and no more of adapters"
        )
    stems = []
    for name, tensor in found.tensors.items():
        stem, _, part = name.rpartition(".lora_")
        other = found.tensors.get(f"{stem}.lora_{'b' if part == 'a' else 'a'}")
        if other is None:
            parts.whole(name, array_of(tensor))
        elif part == "a":
            a, b = (x if x.ndim == 3 else x[None] for x in map(array_of, (tensor, other)))
            parts.low_rank(stem, a, b, alpha / b.shape[-1] if alpha else 1.0)
            stems.append(stem)
    return float(alpha), tuple(sorted(stems))
