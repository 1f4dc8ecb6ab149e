"""`squall adapters`: lists, shows and merges LoRA adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from squall.cli import tables
from squall.cli.inspect import inspect
from squall.cli.opening import named_adapters
from squall.cli.options import HELP, Json, Threads, progress
from squall.errors import InvalidRequest, ModelNotFound
from squall.opening import NO_MMPROJ, Opening

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
    if not found:
        raise ModelNotFound(
            f"no {CONFIG} in {', '.join(folders)}, nor in folders there; name folders of adapters"
        )
    if as_json:
        typer.echo(json.dumps(found))
        return
    from squall.checkpoints.inspect import escape

    headings = ("adapter", "kind", "rank", "alpha", "base model", "bytes")
    rows = ([escape(str(value)) for value in item.values()] for item in found)
    tables.show(tables.table(headings, rows))


app.command(name="inspect")(inspect)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="A folder of floats, or a model of the hub.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="PATH[@WEIGHT]", help="Folders, owner/name, GGUF files.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="A folder, .gguf or .uqff.")],
    isq: Annotated[str | None, typer.Option(help="What to quantize a file to: Q4K...")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file.")] = False,
    threads: Threads = None,
) -> None:
    """Write a model that has adapters in its weights, as a folder or a quantized file.

    Example:

    squall adapters merge FOLDER adapters/law@0.7 adapters/sql@0.3 -o merged.gguf --isq Q4K
    """
    from squall import convert
    from squall.adapters.lora import read
    from squall.adapters.target import Target
    from squall.assembly import prepare
    from squall.executors import default_threads

    with progress("fetching") as shown:
        checkpoint, recipe, plan = prepare(Opening(base, isq=isq, mmproj=NO_MMPROJ, progress=shown))
    target = Target.of(checkpoint, recipe)
    named = named_adapters(adapters)
    loras = [(read(path, target), weight) for path, weight in named.values()]
    with progress(f"writing {output.name}") as shown:
        if output.suffix not in (".gguf", ".uqff"):
            if isq is not None:
                raise InvalidRequest("--isq: a folder has floats; write NAME.gguf or NAME.uqff")
            convert.merge_folder(checkpoint, recipe, loras, output, progress=shown)
        else:
            threads = threads or default_threads()
            merged = convert.merged(checkpoint, recipe, loras)
            convert.write(*merged, plan, output, force=force, threads=threads, progress=shown)
    typer.echo(f"{output}: {checkpoint.path} with {', '.join(named)}")
