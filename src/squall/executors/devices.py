"""Devices, by name, and which layers of a model run on which."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from squall.errors import InvalidRequest
from squall.quant.isq import Dtype

if TYPE_CHECKING:
    from squall.executors.parallel import Ranks

# The native executor; PyTorch on the CPU; PyTorch on a GPU of NVIDIA's, or of Apple's.
_FORM = re.compile(r"(cpu|torch|(?:cuda|mps|metal)(?::\d+|\[\d+\])?)")


def device_name(text: str) -> str:
    """A device as it is called here: "cpu", "torch", "cuda:0", "mps".

    "cuda" is the first, "cuda[1]" is "cuda:1" and "metal[0]" is "mps", as in topologies.
    Raises InvalidRequest for what is none; whether it is there is not asked.
    """
    if not _FORM.fullmatch(text):
        raise InvalidRequest(
            f"unknown device {text!r}; devices are cpu, cuda, cuda:N, mps, and torch: "
            "PyTorch on the CPU"
        )
    kind, _, number = text.rstrip("]").replace("[", ":").partition(":")
    return {"cuda": f"cuda:{int(number or 0)}", "metal": "mps"}.get(kind, kind)


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers that run on one device, after those of the stage before; None: all that are left."""

    device: str
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """What runs where.

    stages: of a program with layers; one without runs where the first of them is.
    exact: rows are the same whatever they are computed with, also where that takes longer.
    dtype: of activations on PyTorch's devices; auto: bf16 or f16 where a device has it, else f32.
    ranks: the processes that run a part of every layer each, this one among them.
    """

    stages: tuple[Stage, ...] = (Stage("cpu"),)
    exact: bool = True
    dtype: Dtype = "auto"
    ranks: Ranks | None = None


CPU = Placement()
