"""Devices, by name: those that are here, and which layers of a model run on which."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from squall.errors import InvalidRequest
from squall.machine import available_bytes, total_bytes
from squall.quant.isq import Dtype

if TYPE_CHECKING:
    from squall.executors.parallel import Ranks

# The native executor; PyTorch on the CPU; PyTorch on a GPU of NVIDIA's, or of Apple's.
_FORM = re.compile(r"cpu|torch|cuda(:\d{1,3}|\[\d{1,3}\])?|(mps|metal)(:0|\[0\])?")
_LISTED = re.compile(r"\s*([^=\s]*)(?:=(\d{1,9}))?\s*")
_COUNTED = re.compile(r"(?:(\d{1,3}):)?(\d{1,9})")
# Where no driver is, PyTorch need not be asked: of Linux, and of Windows' subsystem for it.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")

# Of a GPU's memory, what is left for activations, and for what PyTorch takes beside.
_KEPT_SHARE, _KEPT_BYTES = 0.05, 512 << 20

AUTO = "auto"


def device_name(text: str) -> str:
    """A device as it is called here: "cpu", "torch", "cuda:0", "mps".

    "cuda" is the first, "cuda[1]" is "cuda:1" and "metal[0]" is "mps", as in topologies.
    Raises InvalidRequest for what is none; whether it is there is not asked.
    """
    if not _FORM.fullmatch(text):
        raise InvalidRequest(
            f"unknown device {text!r}; devices are cpu, cuda, cuda:N, mps, and torch: "
            "PyTorch on the CPU; auto chooses, and DEVICE=LAYERS;DEVICE gives layers to several"
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

    @property
    def first(self) -> Placement:
        """Where this begins, for all of what is beside the model: towers and drafts."""
        return replace(self, stages=self.stages[:1], ranks=None)

    def spread(self, layers: int) -> list[tuple[str, int]]:
        """Which devices run how many of so many layers; the last one has all that are left."""
        found, left = [], layers
        for stage in self.stages[:-1]:
            count = left if stage.layers is None else min(stage.layers, left)
            found.append((stage.device, count))
            left -= count
        found.append((self.stages[-1].device, left))
        return [(device, count) for device, count in found if count] or found[:1]

    def overridden(self, devices: Sequence[str | None]) -> Placement:
        """With devices for layers; None: as it is."""
        if not any(devices):
            return self
        spread = [device for device, count in self.spread(len(devices)) for _ in range(count)]
        chosen = [own or before for own, before in zip(devices, spread, strict=True)]
        stages = [Stage(device, len(list(run))) for device, run in groupby(chosen)]
        return replace(self, stages=tuple(stages))


CPU = Placement()


def stages_of(device: str, layers: int | str | Sequence[str] | None = None) -> tuple[Stage, ...]:
    """What users mean; layers that they leave over run on the CPU, after the others.

    device: a name, or DEVICE=LAYERS;...;DEVICE. layers: of GPUs by number, "0:16;1:12" or as a
    list; a number alone is of the first GPU.
    """
    stages = _listed(device) if layers is None else _counted(layers)
    if layers is not None and device != "cpu":
        raise InvalidRequest(
            f"device_layers is {layers!r} and device {device!r}; give one of them, such as "
            "device='cuda:0=20;cpu'"
        )
    stages = [stage for stage in stages if stage.layers != 0]
    rest = [Stage("cpu")] if not stages or stages[-1].layers is not None else []
    return (*stages, *rest)


def _listed(text: str) -> list[Stage]:
    parts = [_LISTED.fullmatch(part) for part in text.split(";")]
    if None in parts or not all(part and part[2] for part in parts[:-1]):
        raise InvalidRequest(
            f"device is {text!r}; write how many layers each has, and last the device that has "
            "the rest: DEVICE=LAYERS;DEVICE=LAYERS;DEVICE"
        )
    return [
        Stage(device_name(part[1]), int(part[2]) if part[2] else None) for part in parts if part
    ]


def _counted(layers: int | str | Sequence[str]) -> list[Stage]:
    text = ";".join(map(str, layers)) if isinstance(layers, list | tuple) else str(layers)
    parts = [_COUNTED.fullmatch(part) for part in text.split(";")]
    found = [(int(part[1] or 0), int(part[2])) for part in parts if part is not None]
    ordinals = {ordinal for ordinal, _ in found}
    if len(found) < len(parts) or len(ordinals) < len(found):
        raise InvalidRequest(
            f"device_layers is {text!r}; it must be a number of layers, or GPU:LAYERS;GPU:LAYERS, "
            "each GPU once"
        )
    kind = "mps" if sys.platform == "darwin" else "cuda"
    return [Stage(device_name(f"{kind}:{ordinal}"), count) for ordinal, count in found]


def chosen(layers: Sequence[int], whole: int, free: Mapping[str, int]) -> tuple[Stage, ...]:
    """All layers on one device if they fit, else as many as fit on each; the rest on the CPU.

    layers: bytes of each. whole: of all together, with what they share. free: of GPUs, in order.
    """
    roomiest = max(free, key=lambda device: free[device], default="cpu")
    if whole <= free.get(roomiest, 0):
        return (Stage(roomiest),)
    found, at = [], 0
    for device, room in free.items():
        fitting = sum(size <= room for size in accumulate(layers[at:]))
        found.append(Stage(device, fitting))
        at += fitting
    rest = [Stage("cpu")] if at < len(layers) else []
    return (*(stage for stage in found if stage.layers), *rest)


# ---- what is here ----


@dataclass(frozen=True, slots=True)
class Device:
    """A device of this machine, with bytes of memory; None: nobody knows."""

    name: str
    total: int | None
    free: int | None
    description: str


def available() -> list[Device]:
    """The devices of this machine."""
    host = (total_bytes(), available_bytes())
    found = [Device("cpu", *host, "the native executor")]
    if find_spec("torch") is not None:
        found.append(Device("torch", *host, "PyTorch on the CPU"))
    return [*found, *map(_gpu, gpus())]


def has_driver() -> bool:
    """Whether this machine has a GPU that PyTorch may know."""
    apple = (sys.platform, platform.machine()) == ("darwin", "arm64")
    return apple or any(map(os.path.exists, _DRIVERS))


def check(device: str) -> None:
    """Raise InvalidRequest for a device that is not here, with those that are."""
    if device != "cpu" and (reason := lack(device)):
        names = (found.name for found in available())
        here = ", ".join(name for name in names if name == "cpu" or not lack(name))
        raise InvalidRequest(f"there is no device {device} here: {reason}; there are: {here}")


def free_bytes(device: str) -> int | None:
    """What a model may take of a device; of a GPU all but what activations and PyTorch need."""
    if device in ("cpu", "torch"):
        return available_bytes()
    free = _gpu(device).free or 0
    return max(int(free * (1 - _KEPT_SHARE)) - _KEPT_BYTES, 0)


def gpus() -> list[str]:
    """The GPUs that PyTorch finds; it is only loaded if there is a driver."""
    if not has_driver() or lack("torch"):
        return []
    import torch

    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*(f"cuda:{number}" for number in range(torch.cuda.device_count())), *mps]


def lack(device: str) -> str:
    """Why a device is not here; "" if it is."""
    if find_spec("torch") is None:
        return "it needs PyTorch: pip install 'squall[torch]'"
    try:
        import torch
    except Exception as error:
        return f"PyTorch cannot be loaded: {error}"
    if device == "torch":
        return ""
    if device == "mps":
        return "" if torch.backends.mps.is_available() else "PyTorch finds no GPU of Apple's"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) has no CUDA; get one at https://pytorch.org"
    count = torch.cuda.device_count()
    return "" if int(device.partition(":")[2]) < count else f"PyTorch finds {count} CUDA devices"


def _gpu(name: str) -> Device:
    import torch

    if name == "mps":
        total = torch.mps.recommended_max_memory()
        return Device(name, total, total - torch.mps.driver_allocated_memory(), "Metal")
    free, total = torch.cuda.mem_get_info(name)
    # What PyTorch keeps of tensors that are gone is free too.
    free += torch.cuda.memory_reserved(name) - torch.cuda.memory_allocated(name)
    about = torch.cuda.get_device_properties(name)
    capability = f"compute capability {about.major}.{about.minor}"
    return Device(name, total, free, f"{about.name}, {capability}")


def one_stage(device: str, what: str) -> tuple[Stage, ...]:
    """All layers on one device that is here, as `what` run. Raises InvalidRequest."""
    if device == AUTO:
        device = next(iter(gpus()), "cpu")
    stages = stages_of(device)
    if len(stages) > 1:
        raise InvalidRequest(f"device is {device!r}; {what} run on one")
    check(stages[0].device)
    return stages
