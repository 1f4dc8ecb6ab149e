"""`squall tune`: how to open a model on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from squall.cli.flags import command
from squall.cli.opening import ModelFlags
from squall.cli.options import ContextSize, Json, option, progress
from squall.cli.selectors import Selected
from squall.cli.tables import show, table
from squall.errors import InvalidRequest
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.tuning import Choice

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class TuneFlags(ModelFlags):
    goal: Literal["quality", "balanced", "speed"] = option(
        "balanced", "--for",
        help="What the choice is to be best at; balanced: the fastest that loses little.",
    )  # fmt: skip
    context: ContextSize = None
    output: Path | None = option(
        None,
        "-o",
        "--output",
        help="Write the choice to this TOML file, for squall serve --models.",
    )
    as_json: Json = False


def tune(flags: TuneFlags, selected: Selected) -> None:
    """Show how a model can be opened here: what fits, its quality, and expected rates.

    Each way to quantize float weights is a line; a model that is quantized has one. Rates are those
    of a prompt of 512 tokens and of the answer after it, as squall bench measures: a few layers are
    run here, and stand for all. The line with * is the choice.

    Examples:

    squall tune FOLDER

    squall tune model.gguf --context 32768

    squall tune FOLDER --for quality -o tuned.toml && squall serve --models tuned.toml
    """
    from squall.tuning import best, choices

    if flags.output is not None and (flags.output.exists() or not flags.output.parent.is_dir()):
        why = "exists" if flags.output.exists() else "would be in a folder that is not there"
        raise InvalidRequest(f"{flags.output} {why}; choose another name")
    with progress("measuring") as shown:
        opening = flags.opening(selected)
        if opening.adapters or opening.xlora or opening.anymoe or opening.write_uqff:
            raise InvalidRequest("tune is about a model alone: leave adapters and --write-uqff out")
        found = choices(replace(opening, context=flags.context), shown)
    if flags.as_json:
        chosen = best(found, flags.goal)
        report = [asdict(choice) | {"chosen": choice is chosen} for choice in found]
        typer.echo(json.dumps({"threads": opening.threads, "choices": report}))
    else:
        _print(found, flags.goal)
        chosen = best(found, flags.goal)
        typer.echo(f"squall serve {shlex.join(_flags(opening, chosen))}")
    if flags.output is not None:
        flags.output.write_text(_toml(opening, chosen), encoding="utf-8")
        sys.stderr.write(f"wrote {flags.output}: squall serve --models {flags.output}\n")


app = command("tune", TuneFlags, tune)


def _print(found: list[Choice], goal: str) -> None:
    from squall.machine import available_bytes
    from squall.tuning import best

    chosen = best(found, goal) if any(choice.context for choice in found) else None
    numbers = ("loss", "weights, MiB", "KV", "context", "all, MiB", "longest", "prompt", "answer")
    rows = []
    for choice in found:
        rates = ("" if rate is None else f"{rate:.1f}" for rate in (choice.prompt, choice.answer))
        rows.append(
            (
                "*" * (choice is chosen),
                choice.isq or f"as they are: {choice.format}",
                "unknown" if choice.loss is None else f"{choice.loss:.1%}",
                f"{choice.weight_bytes / MIB:.0f}",
                choice.kv_dtype,
                choice.context or "does not fit",
                f"{choice.bytes / MIB:.0f}" if choice.context else "",
                choice.longest,
                *rates,
            )
        )
    free = available_bytes()
    caption = "loss: of perplexity, as Llama 3 8B's. Rates: tokens a second, expected."
    caption += "" if free is None else f" Free memory: {free / MIB:.0f} MiB"
    show(table(("", "weights", *numbers), rows, numbers, caption=caption))


def _settings(opening: Opening, chosen: Choice) -> dict[str, str | int]:
    """What differs from the defaults."""
    wanted = {
        "isq": chosen.isq, "context": chosen.context, "kv_dtype": chosen.kv_dtype,
        "threads": opening.threads, "device": opening.device,
    }  # fmt: skip
    defaults = asdict(Opening())
    return {name: value for name, value in wanted.items() if value not in (None, defaults[name])}


def _flags(opening: Opening, chosen: Choice) -> list[str]:
    settings = _settings(opening, chosen)
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    path = [] if opening.path is None else [str(opening.path)]
    return [*path, *(word for flag in flags for word in flag)]


def _toml(opening: Opening, chosen: Choice) -> str:
    """The choice as a file of `squall serve --models`."""
    from squall.locate import locate

    path = locate(opening.path, opening.hub)
    lines = [("path", str(path.absolute())), *_settings(opening, chosen).items()]
    values = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines)
    expected = f"# Expected: prompts {chosen.prompt:.1f}, answers {chosen.answer:.1f} tokens/s.\n"
    return f"{expected}[[model]]\n{values}"
