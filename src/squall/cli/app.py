"""The commands and their help. A command's module is imported when it is asked for."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from squall import __version__
from squall.cli.options import HELP

# By use: models first, and what helps last.
_COMMANDS = {
    "run": "run:app", "serve": "serve:app", "pull": "models:pull", "list": "models:list_",
    "show": "models:show", "rm": "models:rm", "bench": "bench:app", "tune": "tune:app",
    "perplexity": "perplexity:app", "quantize": "quantize:quantize", "adapters": "adapters:app",
    "inspect": "inspect:inspect", "doctor": "doctor:doctor",
}  # fmt: skip


class _Lazy(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command, with all of its flags."""
        if cmd_name in _COMMANDS and self.commands[cmd_name] is None:
            self.commands[cmd_name] = _made(cmd_name)
        return super().get_command(ctx, cmd_name)


def _made(name: str) -> Any:
    found = resolve_name(f"squall.cli.{_COMMANDS[name]}")
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False, context_settings=HELP)
    alone.command(name)(found)
    return typer.main.get_command(alone)


app = typer.Typer(
    name="squall",
    cls=_Lazy,
    help="Fast, flexible LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)


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
