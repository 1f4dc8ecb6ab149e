"""LoRA adapters: read from a folder of PEFT, a GGUF file or the hub, for a base; and merged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from squall.adapters.parts import Parts, array_of, as_linear
from squall.adapters.peft import read_folder
from squall.adapters.target import Target
from squall.checkpoints.gguf import open_gguf
from squall.checkpoints.hub import Hub
from squall.errors import InvalidCheckpoint, InvalidRequest, ModelNotFound, UnsupportedModel
from squall.files import quote
from squall.program import Site
from squall.weights import Term

MAX_ALPHA = 1e6
_KEYS = {f"adapter.{key}" for key in ("type", "lora.alpha", "lora.task_name", "lora.prompt_prefix")}
Weighted = Iterable[tuple["Lora", float]]


@dataclass(frozen=True, slots=True, eq=False)
class Lora:
    """An adapter as a base takes it.

    terms: one a weight. vectors: what is added to norms, by their roles; only merged adapters
        can have them.
    digest: of what changes results, whatever its names and paths.
    rank, alpha: those that modules have unless patterns say otherwise; of a GGUF file the most.
    base: the model that it says it is made for. modules: what it adapts, by the file's names.
    homeless: a role whose bias it adds to, which the base has no place for.
    """

    terms: Mapping[Site, Term]
    vectors: Mapping[str, NDArray[np.float32]]
    digest: str
    rank: int
    alpha: float
    base: str
    modules: tuple[str, ...]
    nbytes: int
    path: Path
    homeless: str = ""


def read(path: str | os.PathLike[str], target: Target, *, hub: Hub | None = None) -> Lora:
    """The adapter in a folder of PEFT or in a file: GGUF, or the weights of such a folder.

    What is not here is looked for in the hub, as `owner/name`, or `owner/name:file` for GGUF.
    """
    chosen = (hub or Hub()).path(path)
    if not os.path.exists(chosen):
        raise ModelNotFound(
            f"there is no adapter {str(path)!r}; name a folder with adapter_config.json, a GGUF "
            "file, or an adapter of the hub as owner/name"
        )
    parts = Parts(target, as_gguf=chosen.suffix == ".gguf")
    if parts.as_gguf:
        alpha, modules = _read_gguf(chosen, parts)
        rank, base = 0, ""
    else:
        folder, weights = (chosen, None) if chosen.is_dir() else (chosen.parent, chosen)
        config, modules = read_folder(folder, weights, parts)
        rank, alpha, base = config.r, config.lora_alpha, config.base_model_name_or_path
    terms = parts.terms()
    vectors = {role: change for role, change in parts.vectors.items() if change.any()}
    if not terms and not vectors:
        raise InvalidCheckpoint(f"the adapter {str(path)!r} changes nothing")
    rank = rank or max((term.rank for term in terms.values()), default=0)
    stored = (part for term in terms.values() for part in (term.a, term.b) if part is not None)
    return Lora(
        terms, vectors, parts.digest(terms), rank, alpha, base, modules,
        sum(part.data.nbytes for part in stored), chosen, parts.homeless,
    )  # fmt: skip


def _read_gguf(path: Path, parts: Parts) -> tuple[float, tuple[str, ...]]:
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


def merged_terms(loras: Weighted) -> dict[Site, tuple[Term, ...]]:
    """What a weight store adds to matrices, and to their biases, for adapters with weights."""
    found: dict[Site, tuple[Term, ...]] = {}
    for lora, weight in loras:
        if lora.homeless:
            raise InvalidRequest(
                f"{str(lora.path)!r} has a bias for {lora.homeless}, where the model has none, and "
                "cannot be merged: keep it beside the model"
            )
        for site, term in lora.terms.items():
            bias = None if term.bias is None else term.bias * np.float32(weight)
            own = replace(as_linear(site, term), scale=term.scale * weight, bias=bias)
            found[site] = (*found.get(site, ()), own)
    return found


def merged_vectors(loras: Weighted) -> dict[str, NDArray[np.float32]]:
    """The same for norms."""
    found: dict[str, NDArray[np.float32]] = {}
    for lora, weight in loras:
        for role, change in lora.vectors.items():
            found[role] = found.get(role, np.float32(0)) + change * np.float32(weight)
    return found
