"""`squall bench`: tokens per second of prompt and answer."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from squall.cli.options import File, Folder, Json, Threads, open_model, source
from squall.errors import InvalidRequest

if TYPE_CHECKING:
    from squall.model import Model


@dataclass(frozen=True, slots=True)
class Result:
    """One test: pp (prompt tokens in as few steps as possible) or tg (one token a step)."""

    test: str
    tokens_per_second: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.tokens_per_second)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.tokens_per_second) if len(self.tokens_per_second) > 1 else 0.0


def bench(
    file: File = None,
    model: Folder = None,
    prompt_tokens: Annotated[int, typer.Option("-p", min=0, help="Tokens of the prompt.")] = 512,
    answer_tokens: Annotated[int, typer.Option("-g", min=0, help="Tokens of the answer.")] = 128,
    repetitions: Annotated[int, typer.Option("-r", min=1, help="Measurements of each.")] = 5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure prompt and answer tokens per second.

    ppN is a prompt of N tokens, computed from nothing; tgN is N tokens after it, one at a time. A
    first round is not counted. Tokens are chosen too, greedily.

    Example:

    squall bench -f model.gguf -p 512 -g 128 -r 5 --threads 2
    """
    path = source(file, model)
    size = max(prompt_tokens, 1) + answer_tokens + 1
    with open_model(path, context=size, threads=threads) as opened:
        results = measure(opened, prompt_tokens, answer_tokens, repetitions)
        if as_json:
            typer.echo(json.dumps(_report(opened, results)))
        else:
            _print_table(opened, results)


def measure(model: Model, prompt: int, answer: int, repetitions: int) -> list[Result]:
    """Rates of `repetitions` rounds after one to warm up; a test of no tokens is left out."""
    if prompt + answer == 0:
        raise InvalidRequest("-p and -g are both 0; there is nothing to measure")
    rounds = [_round(model, prompt, answer) for _ in range(repetitions + 1)][1:]
    found = []
    if prompt:
        found.append(Result(f"pp{prompt}", [prompt / seconds for seconds, _ in rounds]))
    if answer:
        found.append(Result(f"tg{answer}", [answer / seconds for _, seconds in rounds]))
    return found


def _round(model: Model, prompt: int, answer: int) -> tuple[float, float]:
    """Seconds of prompt and of answer; the first token of the answer belongs to the prompt."""
    from squall.engine.generation import Generation
    from squall.engine.request import Request
    from squall.model import GREEDY

    model.engine.clear_cache()
    ids = [(1000 + i) % model.spec.vocab for i in range(max(prompt, 1))]
    request = Request(ids=ids, sampling=GREEDY, max_tokens=answer + 1, ignore_eos=True)
    generation = Generation(model.engine, request)
    generation.read()
    return generation.usage.prompt_s, generation.usage.answer_s


def _report(model: Model, results: list[Result]) -> dict[str, object]:
    from squall import __version__

    return {
        "squall": __version__,
        "model": str(model.checkpoint.path),
        "architecture": model.architecture,
        "file_bytes": model.checkpoint.size_bytes,
        "weight_bytes": model.executor.weight_bytes,
        "threads": model.executor.threads,
        "isa": model.executor.isa,
        "results": [asdict(r) | {"mean": r.mean, "deviation": r.deviation} for r in results],
    }


def _print_table(model: Model, results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    executor = model.executor
    table = Table(caption=f"{executor.threads} threads, {executor.isa}")
    for heading in ("model", "MiB", "test", "tokens/s", "ms/token"):
        table.add_column(heading, justify="left" if heading in ("model", "test") else "right")
    for result in results:
        table.add_row(
            model.checkpoint.path.name,
            f"{executor.weight_bytes / 2**20:.0f}",
            result.test,
            f"{result.mean:.1f} ± {result.deviation:.1f}",
            f"{1000 / result.mean:.2f}",
        )
    Console().print(table)
