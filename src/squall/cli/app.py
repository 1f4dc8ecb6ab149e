"""The commands and their help. Each module imports what is slow to import only when it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from squall import __version__
from squall.cli import adapters, bench, models, perplexity, run, serve, tune
from squall.cli.doctor import doctor
from squall.cli.flags import HELP
from squall.cli.inspect import inspect
from squall.cli.quantize import quantize


class _Ordered(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """The commands by use: models first, and what helps last."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)


_ORDER = (
    "run", "serve", "pull", "list", "show", "rm", "bench", "tune", "perplexity", "quantize",
    "adapters", "inspect", "doctor",
)  # fmt: skip

app = typer.Typer(
    name="squall",
    cls=_Ordered,
    help="Fast, flexible LLM inference.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
for module in (run, serve, bench, tune, perplexity, adapters):
    app.add_typer(module.app)
for command in (models.pull, models.show, models.rm, quantize, inspect, doctor):
    app.command()(command)
app.command("list")(models.list_)


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
