"""`squall adapters`: lists, shows and merges LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from squall.cli.flags import HELP
from squall.cli.inspect import inspect
from squall.cli.options import Json, Threads

app = typer.Typer(
    name="adapters", help="List, show and merge LoRA adapters.", context_settings=HELP
)


@app.command(name="list")
def show(
    folders: Annotated[list[str], typer.Argument(help="Folders of adapters, or with them inside.")],
    as_json: Json = False,
) -> None:
    """List the adapters in folders, and what each is for."""
    from squall.adapters.ordering import CONFIG
    from squall.files import read_json

    found: list[dict[str, Any]] = []
    for path in map(Path, folders):
        for file in sorted([*path.glob(CONFIG), *path.glob(f"*/{CONFIG}")]):
            config = read_json(file) or {}
            size = sum(w.stat().st_size for w in file.parent.glob("adapter_model.*"))
            found.append(
                {
                    "path": str(file.parent),
                    **{key: config.get(key) for key in _COLUMNS},
                    "bytes": size,
                }
            )
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("adapter", "kind", "rank", "alpha", "base model", "MiB")
    for item in found:
        path, *values, size = item.values()
        table.add_row(Text(path), *(Text(str(value)) for value in values), f"{size / 2**20:.1f}")
    Console().print(table)


app.command(name="inspect")(inspect)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The folder of a model, a file, or owner/name.")],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER[@WEIGHT]...")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder, or NAME.gguf.")],
    isq: Annotated[str | None, typer.Option(help="What a .gguf file is quantized to.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files.")] = False,
    threads: Threads = None,
) -> None:
    """Write a model with adapters added to its weights, which are floats.

    squall adapters merge FOLDER adapters/law@0.7 adapters/sql@0.3 -o merged.gguf --isq Q4K
    """
