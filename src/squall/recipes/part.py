"""One network of a model, and where its weights lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from squall.program import Names
from squall.recipes.names import Naming
from squall.roles import Network

Kind = Literal["decoder", "tower", "connector", "encoder", "vae"]


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a model: its Spec, and the places of its weights, found by its naming."""

    kind: Kind
    spec: Network
    naming: Naming
    names: Names = field(default_factory=lambda: MappingProxyType({}))

    @property
    def prefix(self) -> str:
        """What its roles begin with in `names`, so that parts can share a weight store."""
        return "" if self.kind == "decoder" else f"{self.kind}."
