"""`squall perplexity`: how well a model predicts a text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from squall.cli.flags import command
from squall.cli.opening import ModelFlags
from squall.cli.options import Json, option, progress, read_text
from squall.cli.selectors import Selected
from squall.errors import InvalidRequest
from squall.opening import Opening

if TYPE_CHECKING:
    from squall.model import Model


@dataclass(frozen=True, slots=True)
class Score:
    """`perplexity` is exp of the mean negative log-probability; `error` its standard error."""

    perplexity: float
    error: float
    scored_tokens: int
    tokens: int
    window: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class PerplexityFlags(ModelFlags):
    text: Path | None = option(None, "--text", help="A text file, UTF-8; needed.")
    window: int = option(1024, min=2, help="Tokens the model sees at a time.")
    stride: int | None = option(None, min=1, help="Tokens scored in each window; by default half.")
    as_json: Json = False


def perplexity(flags: PerplexityFlags, selected: Selected) -> None:
    """Measure the perplexity of a text.

    It is exp(-mean log p(token | the tokens before it in its window)). Windows end every --stride
    tokens and hold the --window tokens up to there; each token is scored once, in the first window
    that has it. So all but those of the first window see at least window - stride tokens. A model
    that wants a BOS token gets it at the start of every window. The very first token of the text is
    scored only if there is a BOS before it.

    Example:

    squall perplexity -f model.gguf --text wiki.txt

    squall perplexity plain -m FOLDER --isq Q4K --text wiki.txt
    """
    # Not required by its type, since it may come before a kind or after it.
    if flags.text is None:
        raise typer.BadParameter("name a text file", param_hint="--text")
    content, stride = read_text(flags.text), flags.stride or max(flags.window // 2, 1)
    with flags.open(selected, Opening(context=flags.window)) as opened:
        score = measure(opened, content, window=flags.window, stride=stride)
    if flags.as_json:
        typer.echo(json.dumps(asdict(score)))
    else:
        typer.echo(
            f"perplexity {score.perplexity:.4f} ± {score.error:.4f} "
            f"({score.scored_tokens} of {score.tokens} tokens scored, "
            f"window {score.window}, stride {score.stride})"
        )


app = command("perplexity", PerplexityFlags, perplexity)


def measure(model: Model, text: str, *, window: int, stride: int) -> Score:
    ids = model.encode(text, add_bos=False)
    bos = model.encode("")
    room = window - len(bos)
    if not 1 <= stride <= room:
        raise InvalidRequest(f"stride is {stride}; it must be between 1 and {room}")
    found: list[float] = []
    with progress("scoring") as shown:
        for start, first, stop in _windows(len(ids), room, stride):
            seen = bos + ids[start:stop]
            # Without a BOS the first token of the text has nothing before it.
            first_scored = max(len(bos) + first - start, 1)
            found += model.log_probabilities(seen, start=first_scored).tolist()
            shown(stop, len(ids))
    if not found:
        raise InvalidRequest("the text has fewer than two tokens; there is nothing to predict")
    mean, error = _mean_and_error(found)
    return Score(math.exp(-mean), math.exp(-mean) * error, len(found), len(ids), window, stride)


def _windows(tokens: int, room: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first token to score, stop) of each window."""
    scored = 0
    while scored < tokens:
        stop = min(tokens, scored + stride if scored else room)
        yield max(stop - room, 0), scored, stop
        scored = stop


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))
