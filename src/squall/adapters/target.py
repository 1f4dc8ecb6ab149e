"""A base as adapters see it: what their names of modules mean in its decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Checkpoint
from squall.program import Matrix, Names, Site, Vector
from squall.recipes import Recipe, modules
from squall.recipes.names import Naming
from squall.roles import Shapes, roles
from squall.spec import Decoder
from squall.weights import WeightStore, values

Places = tuple[tuple[Site, int, int], ...]
"""Sites, each with the rows of a module's output that are its own."""

TABLE = "embed"


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A decoder with the weights of a checkpoint.

    shapes: of its weights; the head is one of them also where it shares the table of embeddings.
    """

    checkpoint: Checkpoint
    architecture: str
    decoder: Decoder
    names: Names
    shapes: Shapes
    namings: tuple[Naming, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe) -> Target:
        """The decoder of a recipe, with the weights of its checkpoint."""
        decoder, names, shapes = recipe.decoder, dict(recipe.names), roles(recipe.decoder)
        if decoder.tied:
            names["head.weight"] = names["embed.weight"]
            shapes["head.weight"] = shapes["embed.weight"]
        namings = modules.namings(recipe.architecture)
        return cls(checkpoint, recipe.architecture, decoder, names, shapes, namings)

    def sites(self, module: str) -> Places:
        """The weights that a module is, by its path in transformers or its name in GGUF files.

        Of experts in one module the rows are those of each. Empty if the base has no such module.
        """
        return next(self.readings(module), ())

    def readings(self, module: str) -> Iterator[Places]:
        """All that a name may mean: some mean one weight or several, as one."""
        for found, expert in self._meanings(module):
            if all(len(self.shapes.get(f"{role}.weight", ())) > 1 for role in found):
                places, start = [], 0
                for role in found:
                    rows, _ = self.size((role, 0))
                    experts = range(self._experts(role)) if expert is None else (expert,)
                    places += [((role, e), start, start + rows) for e in experts]
                    start += rows
                if all(e < self._experts(role) for (role, e), _, _ in places):
                    yield tuple(places)

    def norm(self, name: str, size: int) -> tuple[str, int] | None:
        """The role of a norm's weight or bias by its name, and where in it these values begin."""
        module, _, kind = name.rpartition(".")
        for (role, *more), piece in self._meanings(module):
            whole = self.shapes.get(f"{role}.{kind}", ())
            start = (piece or 0) * size
            norm = not more and len(whole) == len(self.shapes.get(f"{role}.weight", ())) == 1
            if norm and (whole == (size,) or piece is not None):
                return (f"{role}.{kind}", start) if start + size <= whole[0] else None
        return None

    def size(self, site: Site) -> tuple[int, int]:
        """Rows and columns."""
        rows, cols = self.shapes[f"{site[0]}.weight"][-2:]
        return rows, cols

    def order(self, role: str, *, paired: bool) -> NDArray[np.intp] | None:
        """Which row of an adapter is each row of the base; None: they have one order.

        paired: q and k of the adapter are as GGUF files have them.
        """
        if (
            self._as_gguf(paired=paired) == 0
            or not modules.are_paired(self._gguf_name)
            or not role.endswith((".attention.q", ".attention.k"))
        ):
            return None
        order = modules.pairs(self.decoder, int(role.split(".")[1]), self.size((role, 0))[0])
        return np.argsort(order) if paired else order

    def norm_offset(self, *, paired: bool) -> float:
        """What is added to an adapter's norms for them to be as the base's."""
        return self._as_gguf(paired=paired) * modules.norm_offset(self._gguf_name)

    def matrix(self, site: Site) -> NDArray[np.float32]:
        """The base's values, [rows, cols]."""
        role, expert = site
        names, (rows, cols) = self.names[f"{role}.weight"], self.size(site)
        matrix = Matrix(names, rows, cols, self._experts(role), role, restored=True)
        return values(WeightStore(self.checkpoint, exact=True).rows(matrix, expert), cols)

    def values(self, role: str) -> NDArray[np.float32]:
        """Those of a norm or a bias; 0 where the base has none."""
        if role not in self.names:
            return np.zeros(self.size((role.removesuffix(".bias"), 0))[0], np.float32)
        vector = Vector(self.names[role], self.shapes[role][0])
        return WeightStore(self.checkpoint).vector(vector)

    @property
    def _gguf_name(self) -> str:
        return modules.gguf_architecture(self.architecture) or ""

    def _as_gguf(self, *, paired: bool) -> int:
        """1: the base is as GGUF files are, and the adapter is not; -1: the other way round."""
        return (self.checkpoint.kind == "gguf") - paired

    def _experts(self, role: str) -> int:
        return math.prod(self.shapes[f"{role}.weight"][:-2])

    def _meanings(self, module: str) -> Iterator[tuple[tuple[str, ...], int | None]]:
        # Models that see have their language model in a part of that name, or have had.
        name = module.replace("language_model.", "").removesuffix(".weight")
        for naming in self.namings:
            yield from naming.meanings(name)
