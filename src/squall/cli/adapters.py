"""`squall adapters`: lists, shows and merges LoRA adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from squall.cli.flags import HELP
from squall.cli.inspect import inspect
from squall.cli.options import Json

app = typer.Typer(
    name="adapters", help="List, show and merge LoRA adapters.", context_settings=HELP
)
_COLUMNS = ("peft_type", "r", "lora_alpha", "base_model_name_or_path")


@app.command(name="list")
def show(
    folders: Annotated[
        list[str], typer.Argument(help="Folders of adapters, or with such in them.")
    ],
    as_json: Json = False,
) -> None:
    """List the adapters of folders, and what each is for."""
    from squall.adapters.ordering import CONFIG
    from squall.files import read_json

    found = []
    for path in map(Path, folders):
        for file in sorted([*path.glob(CONFIG), *path.glob(f"*/{CONFIG}")]):
            config = read_json(file) or {}
            size = sum(weights.stat().st_size for weights in file.parent.glob("adapter_model.*"))
            columns = {name: config.get(name) for name in _COLUMNS}
            found.append({"path": str(file.parent), **columns, "bytes": size})
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("adapter", "kind", "rank", "alpha", "base model", "bytes")
    for item in found:
        table.add_row(*(Text(str(value)) for value in item.values()))
    Console().print(table)


app.command(name="inspect")(inspect)
