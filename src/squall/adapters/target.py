"""A base as adapters see it: what their names of modules mean in its decoder and its tower."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from squall.checkpoints.base import Checkpoint
from squall.program import Matrix, Names, Site, Vector
from squall.recipes import Recipe, modules
from squall.recipes.names import Naming, Part
from squall.roles import Shapes, roles
from squall.spec import Decoder
from squall.weights import MERGEABLE, WeightStore, values

Places = tuple[tuple[Site, int, int], ...]
"""Sites, each with the rows of a module's output that are its own."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A decoder, perhaps with a tower, with the weights of a checkpoint.

    names, shapes: of its weights; the head is one also where it shares the table of embeddings.
    gguf: what GGUF calls the architecture. others: of other parts than the decoder.
    """

    checkpoint: Checkpoint
    decoder: Decoder
    names: Names
    shapes: Shapes
    namings: tuple[Naming, ...]
    gguf: str | None
    others: tuple[Part, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, recipe: Recipe) -> Target:
        architecture = recipe.text or recipe.architecture
        names = {"head.weight": recipe.names["embed.weight"], **recipe.all_names}
        shapes = {p.prefix + role: s for p in recipe.parts for role, s in roles(p.spec).items()}
        shapes = {"head.weight": shapes["embed.weight"], **shapes}
        known = modules.namings(architecture), modules.gguf_architecture(architecture)
        others = tuple(part for part in recipe.parts if part.kind != "decoder")
        return cls(checkpoint, recipe.decoder, names, shapes, *known, others)

    def sites(self, module: str) -> Places:
        """The weights that a module is, by its path in transformers or its name in GGUF files.

        Of experts in one module the rows are those of each. Empty if the base has no such module.
        """
        return next(self.readings(module), ())

    def readings(self, module: str) -> Iterator[Places]:
        """All that a name may mean: some mean one weight or several, as one."""
        for found, expert in self._meanings(module):
            places, start = list[tuple[Site, int, int]](), 0
            for matrix in (self.matrix(role) for role in found):
                if matrix is None or (expert or 0) >= matrix.experts:
                    break
                stop = start + matrix.rows
                experts = range(matrix.experts) if expert is None else (expert,)
                places += [((matrix.role, e), start, stop) for e in experts]
                start = stop
            else:
                yield tuple(places)

    def norm(self, name: str, size: int) -> tuple[str, int] | None:
        """The role of a norm's weight or bias by its name, and where in it these values begin."""
        module, _, kind = name.rpartition(".")
        for (role, *_), piece in self._meanings(module):
            whole, start = self.shapes.get(f"{role}.{kind}", (0,)), (piece or 0) * size
            fits = start + size == whole[0] if piece is None else start + size <= whole[0]
            if fits and len(self.shapes[f"{role}.weight"]) == 1:
                return f"{role}.{kind}", start
        return None

    def is_unused(self, module: str) -> bool:
        """Whether the checkpoint has the module in a tower of which it is not read."""
        name = modules.OUTER.sub("", module)
        outer = (modules.OUTER.match(part.naming.layer) for part in self.others)
        names = [f"{match[0]}{name}.weight" for match in outer if match]
        return any(part.naming.harmless.fullmatch(n) for part in self.others for n in names)

    def matrix(self, role: str) -> Matrix | None:
        """The weight of a role such as `layers.3.attention.q`."""
        *more, rows, cols = (0, *self.shapes.get(f"{role}.weight", (0,)))
        if not more:
            return None
        experts, names = math.prod(more[1:]), self.names[f"{role}.weight"]
        return Matrix(names, rows, cols, experts, role, restored=True)

    def is_float(self, role: str) -> bool:
        (part, *_) = self.names[f"{role}.weight"]
        return self.checkpoint.tensors[part.tensor].format in MERGEABLE

    def values(self, site: Site) -> NDArray[np.float32]:
        """The base's weight, [rows, cols]."""
        matrix = self.matrix(site[0])
        assert matrix is not None
        store = WeightStore(self.checkpoint, exact=True)
        return values(store.rows(matrix, site[1]), matrix.cols)

    def vector(self, role: str, size: int) -> NDArray[np.float32]:
        """The values of a norm or a bias; 0 where the base has none."""
        if role not in self.names:
            return np.zeros(size, np.float32)
        return WeightStore(self.checkpoint).vector(Vector(self.names[role], self.shapes[role][0]))

    def _meanings(self, module: str) -> Iterator[tuple[tuple[str, ...], int | None]]:
        # Models that see have their language model in a part of that name, or have had.
        name = re.sub(r"\b(language|text)_model\.", "", module).removesuffix(".weight")
        for naming in self.namings:
            yield from naming.meanings(name)
        # Towers too have had other names; those of the checkpoint may be others than PEFT saw.
        inner = modules.OUTER.sub("", name)
        for part in self.others:
            for stems, piece in modules.inner(part.naming).meanings(inner):
                yield tuple(part.prefix + stem for stem in stems), piece
