"""Models by name: `squall pull`, `list`, `show` and `rm`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from squall import names
from squall.checkpoints.hub import Hub
from squall.cli import tables
from squall.cli.completion import complete_known, complete_local
from squall.cli.getting import get_default
from squall.cli.inspect import examined, of_pictures
from squall.cli.opening import makes_pictures
from squall.cli.options import Json, Revision, TokenSource, progress
from squall.cli.verdict import mib
from squall.errors import InvalidRequest, SquallError
from squall.names import DEFAULT, Installed
from squall.opening import Opening

# Architectures of parts of models that make pictures.
_PARTS = ("clip", "clip_text_model", "flux", "t5", "t5encoder")
Known = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME...",
        help="A short name, owner/name, or owner/name:file.",
        autocompletion=complete_known,
    ),
]
Local = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME...", help="As squall list shows it.", autocompletion=complete_local
    ),
]


def pull(
    models: Known,
    revision: Revision = "main",
    token_source: TokenSource = "cache",
) -> None:
    """Download models, or what is missing of them, and tell where they are.

    Examples:

    squall pull smollm2:1.7b

    squall pull owner/name:Q4_K_M
    """
    hub = Hub(revision, token_source)

    def get(name: str) -> None:
        if name == DEFAULT:
            get_default(yes=True)
            typer.echo(f"{name}: {names.find(name).path}")
            return
        with progress(name, sizes=True) as shown:
            path = names.pull(name, hub, shown, judge)
        typer.echo(f"{name}: {path}")

    _each(models, get)


def judge(metadata: Mapping[str, object]) -> None:
    """Raises UnsupportedModel for what is neither a model that Squall runs nor a part of one."""
    from squall import recipes
    from squall.embeddings.files import embeds

    kind = metadata.get("general.architecture", metadata.get("model_type"))
    if kind not in _PARTS and not embeds(Path(os.devnull), metadata):
        recipes.judge(metadata)


def list_(as_json: Json = False) -> None:
    """List the models that are here, with size and format.

    They are in the hub's cache, or named in models.toml; the default one came with pip.
    """
    models = names.installed()
    if as_json:
        typer.echo(json.dumps([_report(model) for model in models]))
        return
    if not models:
        sys.stderr.write(
            "no models are here; get one with squall pull NAME, such as smollm2:1.7b\n"
        )
        return
    rows = []
    for model in models:
        modified = datetime.fromtimestamp(model.modified).strftime("%Y-%m-%d %H:%M")
        rows.append((model.name, mib(model.bytes), modified, model.format))
    headings = ("name", "MiB", "modified", "format")
    tables.show(tables.table(headings, rows, ("MiB",), box=None, pad_edge=False))


def rm(
    models: Local,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Remove models from the hub's cache.

    What other models of a repository have stays, and so do files elsewhere.
    """

    def remove(name: str) -> None:
        model = names.find(name)
        if not yes:
            if not _on_terminal():
                raise InvalidRequest("standard input is no terminal to ask on; give --yes")
            typer.confirm(f"Remove {model.name} ({mib(model.bytes)} MiB)?", abort=True, err=True)
        typer.echo(f"{model.name}: {mib(names.remove(model))} MiB are free again")

    _each(models, remove)


def show(
    model: Annotated[
        str, typer.Argument(metavar="NAME", help="Of a model here.", autocompletion=complete_local)
    ] = DEFAULT,
    as_json: Json = False,
) -> None:
    """Tell what a model is, whether Squall can run it, and what that takes.

    squall inspect tells more, of files and of models of the hub, too.
    """
    found = names.find(model)
    if makes_pictures(str(found.path)):
        verdict = of_pictures(Opening(found.path)).verdict
    else:
        verdict = examined(str(found.path))[1]
    if as_json:
        typer.echo(json.dumps(_report(found) | {"verdict": verdict.report()}))
        return
    context = None if verdict.context is None else f"{verdict.context} tokens"
    rows = {
        "name": found.name,
        "path": str(found.path),
        "size": f"{mib(found.bytes)} MiB, {found.format}",
        "architecture": verdict.architecture,
        "parameters": f"{verdict.parameters / 1e6:.1f} million",
        "quantization": verdict.quantization,
        "context": context,
        "license": verdict.license,
        "template": ", ".join(verdict.can),
        "images": verdict.sees,
    }
    lines = [f"{name + ':':15}{text}" for name, text in rows.items() if text]
    tables.show(str(verdict), *lines)


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _report(model: Installed) -> dict[str, Any]:
    found = asdict(model) | {"path": str(model.path)}
    return {name: value for name, value in found.items() if name != "files"}


def _each(models: Iterable[str], act: Callable[[str], None]) -> None:
    """Act on each; what fails is told, and the others follow."""
    failed = [name for name in models if not _tried(act, name)]
    if failed:
        raise typer.Exit(1)


def _tried(act: Callable[[str], None], name: str) -> bool:
    try:
        act(name)
    except SquallError as error:
        sys.stderr.write(f"error: {error}\n")
        return False
    return True
