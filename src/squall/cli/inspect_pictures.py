"""What `squall inspect` tells of a model that makes pictures: its parts, and what they take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from squall.checkpoints import describe
from squall.errors import SquallError
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.diffusion.parts import Network

SIZES = ((512, 512), (1024, 1024), (1280, 720))
MIB = 2**20


@dataclass(frozen=True, slots=True)
class PartLine:
    """One part. formats: bytes of each in the file. memory, by_layer: bytes of weights together.

    sizes: bytes beside those for pictures of SIZES.
    """

    part: str
    path: str
    parameters: int
    formats: Mapping[str, int]
    memory: int = 0
    by_layer: int = 0
    sizes: tuple[int, ...] = ()
    obstacle: str = ""


def inspect_pictures(opening: Opening, *, as_json: bool) -> None:
    """Print the parts of a model that makes pictures."""
    from squall.diffusion import encoders, transformer, vae
    from squall.diffusion.files import find
    from squall.recipes.encoders import load_clip, load_t5
    from squall.recipes.flux import load_flux
    from squall.recipes.vae import load_vae

    files = find(opening)
    kinds: dict[str, tuple[Path, Callable[..., Any], Callable[..., Any]]] = {
        "transformer": (files.transformer, load_flux, transformer.compile),
        "t5": (files.t5, load_t5, encoders.compile),
        "clip": (files.clip, load_clip, encoders.compile),
        "vae": (files.vae, load_vae, vae.compile_decoder),
    }
    parts = [_line(name, *how) for name, how in kinds.items()]
    if as_json:
        runs = not any(part.obstacle for part in parts)
        sizes = [f"{width}x{height}" for width, height in SIZES]
        report = {"path": str(files.path), "runs": runs, "sizes": sizes}
        typer.echo(json.dumps(report | {"parts": [asdict(part) for part in parts]}))
    else:
        _print(files.path, parts)


def _line(name: str, path: Path, load: Callable[..., Any], compile: Callable[..., Any]) -> PartLine:
    from squall.diffusion.files import open_part
    from squall.diffusion.parts import Network, Room
    from squall.executors import CPU, thread_pool
    from squall.weights import WeightStore

    checkpoint = open_part(path)
    found = describe(checkpoint)
    formats = {total.format: total.nbytes for total in found.formats}
    line = partial(PartLine, name, found.path, found.parameters, formats)
    try:
        part = load(checkpoint)
    except SquallError as error:
        return line(obstacle=str(error))
    program, room = compile(part.spec, part.names), Room(CPU, thread_pool(1))
    network, cut = (
        Network(program, WeightStore(checkpoint), room, by_layer=by_layer)
        for by_layer in (False, True)
    )
    sizes = tuple(_needs(name, network, part.spec, size) for size in SIZES)
    return line(network.weight_bytes, cut.weight_bytes, sizes)


def _needs(name: str, network: Network, spec: Any, size: tuple[int, int]) -> int:
    """Bytes of a run beside weights."""
    scale = 1 << len(spec.widths) - 1 if name == "vae" else 8
    places = size[0] * size[1] // scale**2
    text = 512 if getattr(spec, "guidance", True) else 256
    rows = {"tokens": getattr(spec, "positions", 0) or text, "text": text, "one": 1}
    rows |= {"picture": places // 4, "all": places // 4 + text}
    rows |= {f"s{i}": places << 2 * i for i in range(len(getattr(spec, "widths", ())))}
    return network.needs(rows) - network.weight_bytes


def _print(path: Path, parts: list[PartLine]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("part", "where", "million parameters", "types", "MiB", "by layer, MiB")
    table.columns[1].overflow = "fold"
    for part in parts:
        sizes = [f"{count / MIB:.1f}" for count in (part.memory, part.by_layer)]
        formats = ", ".join(part.formats)
        table.add_row(part.part, Text(part.path), f"{part.parameters / 1e6:.1f}", formats, *sizes)
    console.print(table)
    whole, cut = sum(part.memory for part in parts), max(part.by_layer for part in parts)
    console.print(
        f"Weights: {whole / MIB:.1f} MiB; as flux-offloaded {cut / MIB:.1f} MiB at a time"
    )
    for index, (width, height) in enumerate(SIZES):
        most = max(part.sizes[index] if part.sizes else 0 for part in parts)
        console.print(f"A picture of {width}x{height}: {most / MIB:.1f} MiB beside them")
    obstacle = "; ".join(f"{part.part}: {part.obstacle}" for part in parts if part.obstacle)
    console.print(Text(f"{path}: Squall can run it: {f'no: {obstacle}' if obstacle else 'yes'}"))
