"""What becomes of weights when a model is opened: which are quantized, and to what."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from squall.errors import InvalidRequest
from squall.quant.formats import FORMATS
from squall.quant.topology import EVERYWHERE, Topology

Dtype = Literal["auto", "f32", "f16", "bf16"]

# Names that a user may give -> number formats.
TYPES = {
    "q4_0": "q4_0", "q4_1": "q4_1", "q5_0": "q5_0", "q5_1": "q5_1", "q8_0": "q8_0",
    "q8_1": "q8_1", "q2k": "q2_k", "q3k": "q3_k", "q4k": "q4_k", "q5k": "q5_k", "q6k": "q6_k",
    "q8k": "q8_k", "hqq8": "hqq8", "hqq4": "hqq4", "hqq3": "hqq3", "hqq2": "hqq2",
    "hqq1": "hqq1", "fp8": "f8_e4m3",
}  # fmt: skip
BITS = {"2": "q2k", "3": "q3k", "4": "q4k", "5": "q5k", "6": "q6k", "8": "q8_0"}
# Where rows are no whole blocks: a format of smaller blocks.
FALLBACKS = {
    "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q4_1", "q5_k": "q5_0", "q6_k": "q5_1",
    "q8_k": "q8_1", "hqq8": "q8_0", "hqq4": "q4_1", "hqq3": "q4_1", "hqq2": "q4_0",
    "hqq1": "q4_0",
}  # fmt: skip
_KEPT = ("embed", "classifier", "router", "patches", "class", "positions", "types", "newline")
_LAYER = re.compile(r"(?:(?:encoder|flux)\.)?layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class FormatTotal:
    """All matrices of one number format, as they lie in memory."""

    format: str
    matrices: int
    parameters: int
    nbytes: int


def parse_type(name: str) -> str:
    """The number format of an ISQ type such as "Q4K", or of a number of bits such as "4".

    Case and "_" are free. Mixtures of GGUF files, such as Q4_K_M, mean what most of them is.
    """
    key = _key(name)
    if key not in _FORMATS:
        raise InvalidRequest(
            f"unknown quantization {name!r}; known: {', '.join(TYPES)}, "
            f"or a number of bits: {', '.join(BITS)}"
        )
    return _FORMATS[key]


def _key(name: str) -> str:
    return re.sub(r"k[sml]$", "k", re.sub(r"[-_\s]", "", name.lower()))


_FORMATS = {_key(name): format for name, format in TYPES.items()}
_FORMATS |= {_key(format): format for format in TYPES.values()}
_FORMATS |= {key: TYPES[name] for bits, name in BITS.items() for key in (bits, f"q{bits}")}


def fitting(format: str, cols: int) -> str | None:
    """`format`, or what replaces it where rows of `cols` values are no whole blocks of it."""
    chosen: str | None = format
    while chosen is not None and cols % FORMATS[chosen].block:
        chosen = FALLBACKS.get(chosen)
    return chosen


@dataclass(frozen=True, slots=True)
class Plan:
    """What each matrix of a model becomes.

    isq: the number format of those that are quantized; None: none are, but by the topology.
    experts_only: only experts and the head are quantized, what makes most of a mixture of experts.
    dtype: the format of float matrices that are not quantized; auto: as they are stored.
    """

    isq: str | None = None
    topology: Topology = EVERYWHERE
    experts_only: bool = False
    dtype: Dtype = "auto"

    @classmethod
    def of(
        cls,
        isq: str | int | None = None,
        topology: Topology | str | os.PathLike[str] | None = None,
        *,
        experts_only: bool = False,
        dtype: str = "auto",
    ) -> Plan:
        """A plan from what users write; raises InvalidRequest for what is unknown."""
        if isinstance(topology, str | os.PathLike):
            topology = Topology.from_file(Path(topology))
        if dtype not in get_args(Dtype):
            known = ", ".join(get_args(Dtype))
            raise InvalidRequest(f"unknown dtype {dtype!r}; known: {known}")
        format = None if isq is None else parse_type(str(isq))
        topology = topology or EVERYWHERE
        for name in topology.types:
            parse_type(name)
        return cls(format, topology, experts_only, dtype)  # type: ignore[arg-type]

    @property
    def quantizes(self) -> bool:
        return self.isq is not None or bool(self.topology.types)

    def target(self, role: str, stored: str, cols: int) -> str:
        """The format for rows of `cols` values, now `stored`, of a role as `layers.3.attention.q`.

        Embeddings, of pixels too, norms, biases, classifiers and the router of a mixture of experts
        stay as they are, and so does what has no rows of whole blocks, not even of a replacement's.
        """
        wanted = self._wanted(role)
        found = None if wanted is None else fitting(wanted, cols)
        if found is not None:
            return found
        return stored if self.dtype == "auto" or FORMATS[stored].block > 1 else self.dtype

    def _wanted(self, role: str) -> str | None:
        if role.rpartition(".")[2] in _KEPT:
            return None
        layer = _LAYER.match(role)
        if layer is None and role.startswith("flux."):
            return None
        if self.experts_only and role != "head" and ".experts." not in role:
            return None
        chosen = self.topology.isq_of(int(layer[1])) if layer else None
        return self.isq if chosen is None else parse_type(chosen)
