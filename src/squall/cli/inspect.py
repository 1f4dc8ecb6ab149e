"""`squall inspect`: what is in a model file, and whether Squall can run it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from squall.cli.opening import check_one
from squall.cli.options import File, Folder, Json
from squall.errors import SquallError

if TYPE_CHECKING:
    from squall.checkpoints import Checkpoint, Inspection


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="A GGUF file, or the folder of a model; by default the default."),
    ] = None,
    file: File = None,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Show metadata, tensors and types of a model file, and whether Squall can run it.

    Only the header is read. The exit status is 1 if the file is broken; a model that is well-formed
    but not supported is shown all the same.

    Example:

    squall inspect model.gguf
    """
    from squall.checkpoints import describe, read_header
    from squall.locate import locate

    check_one(model, file, folder)
    name = model or file or folder
    adapter = None if name is None else _adapter(Path(name).expanduser())
    path = adapter.path if adapter else locate(name)
    header = adapter or read_header(path)
    if adapter or header.metadata.get("general.type") == "adapter":
        obstacle = f"it is an adapter; open a model with it: squall run MODEL --adapter {path}"
    else:
        obstacle = _obstacle(path)
    found = describe(header)
    if as_json:
        report = asdict(found) | {"runs": not obstacle, "obstacle": obstacle or None}
        typer.echo(json.dumps(report))
    else:
        _print(found, obstacle)


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


def _obstacle(path: Path) -> str:
    """Why Squall cannot run the model; "" if it can."""
    from squall import recipes
    from squall.assembly import open_tokenizer
    from squall.checkpoints import open_checkpoint

    try:
        checkpoint = open_checkpoint(path)
        recipes.load(checkpoint)
        open_tokenizer(checkpoint)
    except SquallError as error:
        return str(error)
    return ""


def _print(found: Inspection, obstacle: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    metadata = Table("key", "value", title="metadata", title_justify="left")
    metadata.columns[0].overflow = "fold"
    for field in found.metadata:
        metadata.add_row(Text(field.key), Text(str(field)))
    tensors = Table("tensor", "type", "shape", "bytes", title="tensors", title_justify="left")
    tensors.columns[0].overflow = "fold"
    for tensor in found.tensors:
        shape = " x ".join(map(str, tensor.shape))
        tensors.add_row(Text(tensor.name), Text(tensor.format), shape, str(tensor.nbytes))
    totals = Table("type", "tensors", "parameters", "MiB", title="types", title_justify="left")
    for total in found.formats:
        size = f"{total.nbytes / 2**20:.1f}"
        totals.add_row(Text(total.format), str(total.tensors), str(total.parameters), size)
    for table in (metadata, tensors, totals):
        console.print(table)
    form = f"GGUF {found.version}" if found.kind == "gguf" else found.kind
    form += f" ({found.quantization})" if found.quantization else ""
    size = f"{found.parameters / 1e6:.1f} million parameters, {found.size_bytes / 2**20:.1f} MiB"
    console.print(Text(f"{found.path}: {form}, {size}"))
    console.print(Text(f"Squall can run it: {'yes' if not obstacle else f'no: {obstacle}'}"))
