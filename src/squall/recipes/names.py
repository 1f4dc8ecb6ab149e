"""Tensor names: where a model's weights lie in a checkpoint, and whether their shapes fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from squall.checkpoints.base import Checkpoint, Tensor
from squall.errors import InvalidCheckpoint, UnsupportedModel
from squall.files import quote
from squall.program import Names, Slice
from squall.roles import Network, Shapes, roles

Kind = Literal["decoder", "tower", "connector", "encoder", "head", "flux", "vae"]
ROLE = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)")
_NONE = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Naming:
    """How a family of checkpoints calls its tensors, without `.weight` and `.bias`.

    stems: role -> name; in a layer the name follows `layer`, which `{}` stands for the index in.
    pieces: role -> name of one piece of several, `{}` being its index: experts, or heads.
    fused: name -> roles that lie in one tensor, one after another, where they have none of their
        own.
    rows: role -> parameters of which each is a row of the matrix.
    harmless: what may be in a checkpoint unused.
    transposed: roles of matrices that are stored [cols, rows].
    each: what names in each layer begin with, where they do not all have one form.
    """

    stems: Mapping[str, str]
    layer: str
    pieces: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    harmless: re.Pattern[str] = _NONE
    transposed: frozenset[str] = frozenset()
    each: tuple[str, ...] = ()

    def name(self, role: str) -> str:
        """The tensor of a role such as `layers.3.attention.q.weight`."""
        layer, stem, kind = self.split(role)
        return f"{layer}{self.stems[stem]}.{kind}"

    def split(self, role: str) -> tuple[str, str, str]:
        """What names in the role's layer begin with, the role in the layer, weight or bias."""
        match = ROLE.fullmatch(role)
        assert match is not None
        layer, stem, kind = match.groups()
        if layer is None:
            return "", stem, kind
        return self.each[int(layer)] if self.each else self.layer.format(layer), stem, kind

    def meanings(self, name: str) -> Iterator[tuple[tuple[str, ...], int | None]]:
        """What a name without `.weight` may mean: roles, and which piece of them."""
        before, _, after = self.layer.partition("{}")
        match = re.match(rf"{re.escape(before)}(\d{{1,5}}){re.escape(after)}", name)
        layer, rest = (f"layers.{int(match[1])}.", name[match.end() :]) if match else ("", name)
        number = re.search(r"(?<=\.)\d{1,5}(?=\.|$)", rest)
        piece = number and rest[: number.start()] + "{}" + rest[number.end() :]
        found: list[tuple[str, ...]] = [(stem,) for stem, own in self.stems.items() if own == rest]
        found += [stems for own, stems in self.fused.items() if own == rest]
        for stems in found:
            yield tuple(f"{layer}{stem}" for stem in stems), None
        for stem, own in self.pieces.items():
            if number is not None and own == piece:
                yield (f"{layer}{stem}",), int(number[0])


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


def locate(
    parts: Sequence[tuple[Shapes, Naming]], tensors: Mapping[str, Tensor], *, read: set[str]
) -> tuple[Names, ...]:
    """The slices of every role of every part; refuses missing, misshapen and unused tensors.

    read: what is used already.
    """
    found = []
    for shapes, naming in parts:
        finder = _Finder(shapes, tensors, naming)
        found.append(MappingProxyType({role: finder.find(role) for role in shapes}))
    used = read | {part.tensor for names in found for slices in names.values() for part in slices}
    unused = sorted(
        name
        for name in tensors
        if name not in used and not any(n.harmless.fullmatch(name) for _, n in parts)
    )
    if unused:
        listed = ", ".join(quote(name) for name in unused[:6])
        listed += f" and {len(unused) - 6} more" if unused[6:] else ""
        raise UnsupportedModel(
            f"the file has tensors that its architecture does not use: {listed}; "
            "it is a variant that Squall cannot run"
        )
    return tuple(found)


def place(
    parts: Sequence[Part], tensors: Mapping[str, Tensor], *, read: set[str], source: str = ""
) -> tuple[Part, ...]:
    """The parts with the places of their weights in a source; otherwise as `locate`."""
    found = locate([(roles(part.spec), part.naming) for part in parts], tensors, read=read)
    made = []
    for part, names in zip(parts, found, strict=True):
        places = {
            part.prefix + role: tuple(replace(one, source=source) for one in slices)
            for role, slices in names.items()
        }
        made.append(replace(part, names=MappingProxyType(places)))
    return tuple(made)


def check_applied(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModel for weights in a quantization that was not undone."""
    if checkpoint.metadata.get("quantization_config") and not checkpoint.quantization:
        raise UnsupportedModel("config.json has a quantization_config that was not applied")


def _alike(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether values in one shape are rows of another: vectors that are matrices, patches."""
    same = math.prod(stored) == math.prod(shape)
    return same and (len(shape) == 1 or shape[0] in (1, stored[0], math.prod(stored[:-1])))


@dataclass(frozen=True, slots=True)
class _Finder:
    shapes: Shapes
    tensors: Mapping[str, Tensor]
    naming: Naming

    def find(self, role: str) -> tuple[Slice, ...]:
        if names := self.naming.rows.get(self.naming.split(role)[1]):
            shape = (1, *self.shapes[role][1:])
            return tuple(self.whole(role, name, shape) for name in names)
        found = self.fused(role) or self.pieces(role)
        return found or (self.whole(role, self.naming.name(role), self.shapes[role]),)

    def whole(self, role: str, name: str, shape: tuple[int, ...]) -> Slice:
        if name not in self.tensors and (bare := name.rpartition(".")[0]) in self.tensors:
            name = bare  # a parameter that is no module's
        if self.naming.split(role)[1] in self.naming.transposed:
            self.check(name, shape[::-1])
            return replace(self.slice(name, shape), transposed=True)
        if name not in self.tensors or not _alike(self.tensors[name].shape, shape):
            self.check(name, shape)
        return self.slice(name, shape)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.tensors:
            raise InvalidCheckpoint(
                f"the tensor {quote(name)} is missing; its shape would be {shape}"
            )
        found = self.tensors[name].shape
        if found != shape:
            raise InvalidCheckpoint(
                f"tensor {quote(name)} has shape {found}, the metadata asks for {shape}"
            )

    def slice(self, name: str, shape: tuple[int, ...]) -> Slice:
        """The whole tensor: its rows, or, of a vector, its elements."""
        self.tensors[name].check_format()
        if len(shape) == 4:  # a convolution
            self.check(name, shape)
            return Slice(name, 0, shape[0], taps=math.prod(shape[2:]))
        return Slice(name, 0, math.prod(shape[:-1] or shape))

    def fused(self, role: str) -> tuple[Slice, ...]:
        layer, stem, kind = self.naming.split(role)
        for fused, stems in self.naming.fused.items():
            name = f"{layer}{fused}.{kind}"
            if stem not in stems or name not in self.tensors:
                continue
            group = [f"{role.removesuffix(f'{stem}.{kind}')}{s}.{kind}" for s in stems]
            if group[0] not in self.shapes or self.naming.name(group[0]) in self.tensors:
                continue
            sizes = [self.shapes[member][0] for member in group]
            self.check(name, (sum(sizes), *self.shapes[role][1:]))
            self.slice(name, self.shapes[role])
            start = sum(sizes[: group.index(role)])
            return (Slice(name, start, start + self.shapes[role][0]),)
        return ()

    def pieces(self, role: str) -> tuple[Slice, ...]:
        """One tensor an expert, or a head."""
        layer, stem, kind = self.naming.split(role)
        shape = self.shapes[role]
        if stem not in self.naming.pieces or self.naming.name(role) in self.tensors:
            return ()
        names = f"{layer}{self.naming.pieces[stem]}.{kind}"
        if len(shape) == 1:
            first = names.format(0)
            if first not in self.tensors:
                return ()
            size = max(math.prod(self.tensors[first].shape), 1)
            shape = (shape[0] // size, size)
        found = []
        for index in range(shape[0]):
            self.check(names.format(index), shape[1:])
            found.append(self.slice(names.format(index), shape[1:]))
        return tuple(found)
