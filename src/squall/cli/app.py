"""The commands and their help. Each module imports what is slow to import only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from squall import __version__
from squall.cli.bench import bench
from squall.cli.doctor import doctor
from squall.cli.inspect import inspect
from squall.cli.perplexity import perplexity
from squall.cli.quantize import quantize
from squall.cli.run import run
from squall.cli.serve import serve

app = typer.Typer(
    name="squall",
    help="Fast, flexible LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, serve, bench, perplexity, quantize, inspect, doctor):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"squall {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fast, flexible LLM inference.

    Without a model named, the commands use the default one, SmolLM2-135M-Instruct.
    """
