"""Options that several commands share, and what they read and show."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from squall.checkpoints.hub import TOKEN_SOURCES
from squall.cli.completion import complete_known
from squall.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.progress import Progress

HELP = {"help_option_names": ["-h", "--help"]}
PROGRESS_S = 0.5
AVERAGED_S = 3600.0  # for the time left, as a step may take minutes

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, the folder of a model or adapter, a model of the hub, or a short name.",
        autocompletion=complete_known,
    ),
]
File = Annotated[
    str | None, typer.Option("-f", "--file", help="A GGUF file; of a split one any part.")
]
Folder = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="DIR_OR_ID",
        help="A folder with one GGUF model, a short name, or owner/name or owner/name:file of the "
        "hub.",
        autocompletion=complete_known,
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads; by default as many as this process may use.")
]
_DEVICES = "cpu, cuda, cuda:N, mps; auto: GPUs as far as it fits; several: cuda:0=16;cpu."
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME|auto", help=_DEVICES)]
_LAYERS = "Layers on the first GPU, or on several; the rest run on the CPU."
DeviceLayers = Annotated[
    str | None, typer.Option("-n", "--num-device-layers", metavar="N|GPU:N;..", help=_LAYERS)
]
Exact = Annotated[
    bool, typer.Option("--exact/--no-exact", help="On GPUs: bytes that depend on no other request.")
]
TensorParallel = Annotated[
    int | None,
    typer.Option("--tensor-parallel", min=1, help="Processes that share every layer, a GPU each."),
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a model of the hub.")]
TokenSource = Annotated[
    str, typer.Option(metavar="SOURCE", help=f"The hub's token: {TOKEN_SOURCES}.")
]
ContextSize = Annotated[
    int | None, typer.Option("--context", min=1, help="Tokens of prompt and answer together.")
]
DraftModel = Annotated[
    str | None, typer.Option("--draft", metavar="FILE|ngram", help="A small model to guess with.")
]
Yes = Annotated[
    bool, typer.Option("-y", "--yes", help="Get the default model, if it is not here, unasked.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "-c",
        "--chat-template",
        help="In place of the model's: a .jinja or .json file, Jinja, or a name.",
    ),
]


def option(default: Any, *names: str, **settings: Any) -> Any:
    """A field of a command's flags: its default, and the option as typer has it."""
    return field(default=default, metadata={"option": typer.Option(*names, **settings)})


def keyword(name: str, hint: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def taking(
    parameters: Sequence[inspect.Parameter], function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` with the signature that typer reads."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path} is not UTF-8 text; convert it first") from None


@contextmanager
def progress(
    what: str, last: str = "", *, sizes: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, told (done, whole); only if it takes longer than PROGRESS_S.

    last: what comes after all steps, which are long and counted, and have a bar from the start.
    sizes: they are bytes, shown with their rate.
    """
    start_s = time.monotonic()
    bar: Progress | None = None
    with ExitStack() as shown:

        def show(done: int, whole: int) -> None:
            nonlocal bar
            name = what if not last else last if done == whole else f"{what} {done + 1}/{whole}"
            if bar is None and done < whole and (last or time.monotonic() - start_s > PROGRESS_S):
                bar = shown.enter_context(_bar(sizes))
                bar.add_task(name, total=whole, completed=done)
            elif bar is not None:
                bar.update(bar.task_ids[0], description=name, completed=done, total=whole)

        yield show if sys.stderr.isatty() else lambda *_: None


def _bar(sizes: bool) -> Progress:
    from rich import progress as rich
    from rich.console import Console

    columns = rich.Progress.get_default_columns()
    if sizes:
        columns = (*columns[:2], rich.DownloadColumn(), rich.TransferSpeedColumn(), *columns[3:])
    return rich.Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False,
        redirect_stderr=False, speed_estimate_period=10.0 if sizes else AVERAGED_S,
    )  # fmt: skip
