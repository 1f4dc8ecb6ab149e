"""Options that several commands share, and what they read and show."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from squall.checkpoints.hub import TOKEN_SOURCES
from squall.errors import InvalidRequest
from squall.opening import KvDtype, Weights

if TYPE_CHECKING:
    from rich.progress import Progress

PROGRESS_S = 0.5

File = Annotated[
    str | None, typer.Option("-f", "--file", help="A GGUF file; of a split one any part.")
]
Folder = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="DIR_OR_ID",
        help="A folder with one GGUF model, or a model of the hub: owner/name, owner/name:file.",
    ),
]
Mmproj = Annotated[
    str | None,
    typer.Option(
        "--mmproj",
        metavar="FILE|none",
        help="The tower that a GGUF model sees with; by default the one beside it.",
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
ContextSize = Annotated[
    int | None, typer.Option("--context", min=1, help="Tokens of prompt and answer together.")
]
DraftModel = Annotated[
    str | None, typer.Option("--draft", metavar="FILE|ngram", help="A small model to guess with.")
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of a model of the hub.")]
TokenSource = Annotated[
    str, typer.Option(help=f"The hub's token: {TOKEN_SOURCES}.", metavar="SOURCE")
]
Offline = Annotated[bool, typer.Option("--offline", help="Use the hub's cache; no connection.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")]


KvDtypeOption = Annotated[
    KvDtype, typer.Option("--kv-dtype", help="KV cache; q8_0 takes half the memory, costs little.")
]
WeightsOption = Annotated[
    Weights, typer.Option("--weights", help="f32: the file's exact values, for comparisons; slow.")
]


Isq = Annotated[
    str | None,
    typer.Option(
        "--isq", help="Quantize a model of float weights: Q4K, Q8_0, HQQ4, FP8... or bits."
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "-c",
        "--chat-template",
        help="In place of the model's: a .jinja or .json file, Jinja, or a name.",
    ),
]
TopologyFile = Annotated[
    Path | None, typer.Option("--topology", help="A YAML file: quantization by layer.")
]

AdapterPaths = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="[NAME=]PATH[@WEIGHT]",
        help="A LoRA adapter: a folder, owner/name, or a GGUF file; several may be given.",
    ),
]  # fmt: skip
Merge = Annotated[
    bool, typer.Option("--merge", help="Make the adapters part of the weights, which are floats.")
]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path} is not UTF-8 text; convert it first") from None


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, told (done, whole); only if it takes longer than PROGRESS_S."""
    start_s = time.monotonic()
    bar: Progress | None = None
    with ExitStack() as shown:

        def show(done: int, whole: int) -> None:
            nonlocal bar
            if bar is None and done < whole and time.monotonic() - start_s > PROGRESS_S:
                bar = shown.enter_context(_bar())
                bar.add_task(what, total=whole, completed=done)
            elif bar is not None:
                bar.update(bar.task_ids[0], completed=done, total=whole)

        yield show if sys.stderr.isatty() else lambda *_: None


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
