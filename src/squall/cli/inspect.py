"""`squall inspect`: what is in a model file, and whether Squall can run it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from squall.checkpoints.hub import Hub
from squall.cli import tables
from squall.cli.flags import plain
from squall.cli.getting import get_default
from squall.cli.opening import FileFlags, makes_pictures
from squall.cli.options import DeviceLayers, Yes, option
from squall.cli.verdict import Verdict, mib, of_header, of_model
from squall.names import DEFAULT
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.checkpoints import Checkpoint, Inspection
    from squall.executors.memory import Load

SIZES = ((512, 512), (1024, 1024), (1280, 720))  # of pictures
_LORA = re.compile(r"(.+?)\.lora_(?:embedding_)?([aAbB])(?:\..*)?")


@dataclass(frozen=True, kw_only=True)
class InspectFlags(FileFlags):
    device: str | None = option(
        None, metavar="NAME|auto", help="Show what would go where, as --device of run."
    )
    layers: DeviceLayers = None
    yes: Yes = False


def _inspect(flags: InspectFlags) -> None:
    """Tell whether Squall can run a model, and show metadata, tensors and types of its file.

    With --device or -n: how many layers run where, what they take, and what is free. Of an
    adapter it shows which modules are adapted, with which rank; of a model that makes pictures its
    parts, and what they and pictures take. Only headers are read. The
    exit status is 1 if the file is broken; a model that is well-formed but not supported is shown
    all the same.

    Example:

    squall inspect model.gguf
    """
    opening = flags.opening
    name = None if opening.path is None else str(opening.path)
    if name is not None and makes_pictures(name):
        _show_pictures(of_pictures(opening), as_json=flags.as_json)
        return
    if name in (None, DEFAULT):
        get_default(flags.yes)
    found, verdict, modules = examined(name, flags.hub)
    loads = []
    if verdict.obstacle is None and (flags.device, flags.layers) != (None, None):
        device = "cpu" if flags.device is None else flags.device
        placed = Opening(found.path, device=device, device_layers=flags.layers)
        loads = _loads(placed)
    if flags.as_json:
        report = asdict(found) | {"runs": verdict.obstacle is None, "obstacle": verdict.obstacle}
        report |= {"verdict": verdict.report(), "sees": verdict.sees}
        report |= {"modules": [m._asdict() for m in modules]}
        report |= {"placement": [asdict(load) for load in loads]}
        typer.echo(json.dumps(report))
    else:
        _print(found, verdict, modules, loads)


inspect = plain(InspectFlags, _inspect)


def examined(
    name: str | None, hub: Hub | None = None
) -> tuple[Inspection, Verdict, list[_Adapted]]:
    """What is in a model of text or an adapter, whether Squall can run it, and what it adapts."""
    from squall.checkpoints import describe, read_header
    from squall.locate import locate

    adapter = None if name is None else _adapter(Path(os.path.expanduser(name)))
    path = adapter.path if adapter else locate(name, hub)
    header = adapter or read_header(path)
    found = describe(header)
    if adapter or header.metadata.get("general.type") == "adapter":
        how = f"it is an adapter; open a model with it: squall run MODEL --adapter {path}"
        return found, of_header(found, how), _modules(found)
    return found, of_model(path, found), []


class Pictures(NamedTuple):
    """What a model that makes pictures takes, by part and by size of a picture."""

    path: Path
    verdict: Verdict
    parts: list[dict[str, Any]]
    sizes: dict[str, dict[str, int]]


def of_pictures(opening: Opening) -> Pictures:
    """Raises what is wrong with the model."""
    from squall.diffusion.pipeline import OFFLOADED, open_pipeline
    from squall.diffusion.request import PictureRequest
    from squall.machine import available_bytes

    pipeline, path = open_pipeline(replace(opening, architecture=OFFLOADED))  # reads no weight
    parts: list[dict[str, Any]] = [
        {
            "part": name,
            "parameters": sum(total.parameters for total in network.formats),
            "types": sorted({total.format for total in network.formats}),
            "bytes": network.stored_bytes,
            "bytes_by_layer": network.weight_bytes,
        }
        for name, network in pipeline.parts.items()
    ]
    whole = sum(part["bytes"] for part in parts)
    sizes: dict[str, dict[str, int]] = {}
    for width, height in SIZES:
        asked = PictureRequest(prompt="any", width=width, height=height)
        kept, by_layer = whole + pipeline.needs(asked, loaded=True), pipeline.needs(asked)
        sizes[f"{width}x{height}"] = {"bytes": kept, "bytes_by_layer": by_layer}
    types = {name for part in parts for name in part["types"]}
    size, told = next(reversed(sizes.items()))
    verdict = Verdict(
        architecture="flux", parameters=sum(part["parameters"] for part in parts),
        quantization=" and ".join(sorted(types)), memory=told["bytes"],
        usual=f"a picture of {size} ({mib(told['bytes_by_layer'])} as flux-offloaded)",
        free=available_bytes(), can=("makes pictures",),
    )  # fmt: skip
    return Pictures(path, verdict, parts, sizes)


def _show_pictures(found: Pictures, *, as_json: bool) -> None:
    path, verdict, parts, sizes = found
    if as_json:
        report = {"path": str(path), "runs": True, "verdict": verdict.report()}
        typer.echo(json.dumps(report | {"parts": parts, "sizes": sizes}))
        return
    headings = ("part", "parameters", "types", "MiB", "as flux-offloaded, MiB")
    rows = [(p["part"], p["parameters"], ", ".join(p["types"]), *_mib(p)) for p in parts]
    rows += [
        (f"with a picture of {size}, about", "", "", *_mib(told)) for size, told in sizes.items()
    ]
    tables.show(str(verdict), str(path), tables.table(headings, rows, headings[3:]))


def _mib(told: Mapping[str, Any]) -> list[str]:
    return [mib(told[name]) for name in ("bytes", "bytes_by_layer")]


def _adapter(folder: Path) -> Checkpoint | None:
    """The folder of a LoRA adapter, if it is one."""
    from squall.adapters.ordering import CONFIG
    from squall.adapters.peft import tensors_of
    from squall.checkpoints import Checkpoint
    from squall.files import read_json

    if (config := read_json(folder / CONFIG)) is None:
        return None
    tensors = tensors_of(folder)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Checkpoint(folder, config, tensors, size, kind="folder")


class _Adapted(NamedTuple):
    """Modules of one name and rank; without a rank they are saved whole."""

    module: str
    rank: int | None
    layers: list[int]


def _modules(found: Inspection) -> list[_Adapted]:
    """What an adapter adapts, where `*` stands for the numbers of layers and experts."""
    groups: dict[tuple[str, int | None], set[int]] = {}
    for tensor in found.tensors:
        path, rank = tensor.name.removeprefix("base_model.model."), None
        if match := _LORA.fullmatch(path):
            if match[2] not in "aA" or len(tensor.shape) < 2:
                continue
            path, rank = match[1], tensor.shape[-2]
        numbers = map(int, re.findall(r"\.(\d{1,9})(?=\.)", path))
        layers = groups.setdefault((re.sub(r"\.\d+(?=\.)", ".*", path), rank), set())
        layers.update(islice(numbers, 1))
    return [_Adapted(*key, sorted(layers)) for key, layers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    """Such as 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _loads(opening: Opening) -> list[Load]:
    from squall.assembly import place, prepare

    return place([prepare(opening)], opening)[1]


def _print(found: Inspection, verdict: Verdict, modules: list[_Adapted], loads: list[Load]) -> None:
    form = f"GGUF {found.version}" if found.kind == "gguf" else found.kind
    form += f" ({found.quantization})" if found.quantization else ""
    size = f"{found.parameters / 1e6:.1f} million parameters, {mib(found.size_bytes)} MiB"
    lines = [str(verdict), f"{found.path}: {form}, {size}"]
    if verdict.sees:
        lines.append(f"It sees images: {verdict.sees}")
    metadata = ((field.key, field) for field in found.metadata)
    parts = [tables.table(("key", "value"), metadata, title="metadata")]
    if modules:  # in place of hundreds of tensors; --json has them
        adapted = ((m.module, m.rank or "whole", _ranges(m.layers)) for m in modules)
        parts.append(tables.table(("adapts", "rank", "layers"), adapted, title="modules"))
    else:
        headings = ("tensor", "type", "shape", "bytes")
        tensors = (
            (t.name, t.format, " x ".join(map(str, t.shape)), t.nbytes) for t in found.tensors
        )
        parts.append(tables.table(headings, tensors, ("bytes",), title="tensors"))
    numbers = ("tensors", "parameters", "MiB")
    totals = ((t.format, t.tensors, t.parameters, mib(t.nbytes)) for t in found.formats)
    parts.append(tables.table(("type", *numbers), totals, numbers, title="types"))
    if loads:
        sizes = ("layers", "weights, MiB", "KV of 1,000 tokens, MiB", "free, MiB")
        placed = (
            (load.device, load.layers, *map(mib, (load.weights, 1000 * load.kv, load.free)))
            for load in loads
        )
        parts.append(tables.table(("device", *sizes), placed, sizes))
    tables.show(*lines, *parts)
