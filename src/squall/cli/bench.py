"""`squall bench`: tokens per second of prompt and answer, and where the time goes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import typer

from squall.cli.flags import command
from squall.cli.opening import ModelFlags
from squall.cli.options import DraftModel, Json, option, progress
from squall.cli.selectors import Selected
from squall.cli.tables import show, table
from squall.errors import InvalidRequest
from squall.opening import Opening

if TYPE_CHECKING:
    from rich.table import Table

    from squall.load import Load, Report
    from squall.measure import Bench, Profile, Result, Roofline


@dataclass(frozen=True, kw_only=True)
class BenchFlags(ModelFlags):
    prompt_tokens: int = option(512, "-p", "--n-prompt", min=0, help="Tokens of the prompt.")
    answer_tokens: int = option(128, "-g", "--n-gen", min=0, help="Tokens of the answer.")
    depth: int = option(0, "-d", "--depth", min=0, help="Tokens of context before the prompt.")
    batch: int = option(1, "-b", "--batch", min=1, help="Sequences that decode together.")
    repetitions: int = option(5, "-r", "--repetitions", min=1, help="Measurements of each.")
    profile: bool = option(False, "--profile", help="Tell too where the time goes, by kind of op.")
    concurrency: str | None = option(
        None, "-c", "--concurrency", metavar="N,N..", help="Requests at a time."
    )
    url: str | None = option(None, help="Ask a server with OpenAI's API instead of a model here.")
    api_key: str | None = option(None, help="For --url.")
    draft: DraftModel = None
    as_json: Json = False


def bench(flags: BenchFlags, selected: Selected) -> None:
    """Measure prompt and answer tokens per second.

    ppN is a prompt of N tokens; tgN is N tokens after it, one at a time. A first round is not
    counted. With -b the rates are those of all sequences together.

    With -c, --url or --draft whole requests are measured, -r in each place: times to and between
    texts, and of the draft's guesses how many were right.

    Examples:

    squall bench -f model.gguf -p 512 -g 128 -r 5 --threads 2

    squall bench plain -m FOLDER --isq Q4K

    squall bench --url http://127.0.0.1:8080 -p 128 -g 64 -c 1,4,16
    """
    if flags.url is not None or flags.concurrency is not None or flags.draft is not None:
        _bench_load(flags, selected)
        return
    from squall.measure import Roofline

    opened = _opened(flags, selected)
    results = opened.rates(flags.repetitions)
    executor = opened.executor
    profiles = opened.profiles() if flags.profile else []
    native = {stage.device for stage in executor.placement.stages} == {"cpu"}
    isa = executor.isa.rpartition(" ")[2]
    roofline = Roofline.of(isa, executor.threads) if flags.profile and native else None
    if flags.as_json:
        typer.echo(json.dumps(_report(opened, results, profiles, roofline)))
        return
    show(_rates_table(opened, results), *(_profile_table(found, roofline) for found in profiles))


app = command("bench", BenchFlags, bench)


def _opened(flags: BenchFlags, selected: Selected) -> Bench:
    from squall.assembly import place, prepare
    from squall.measure import Bench, Workload

    plan = Workload(
        flags.prompt_tokens, flags.answer_tokens, flags.depth, flags.batch, flags.kv_dtype
    )
    with progress("loading") as shown:
        opening = flags.opening(selected, Opening(progress=shown))
        if opening.write_uqff is not None:
            raise InvalidRequest("--write-uqff: bench writes no files; squall quantize does")
        if opening.adapters or opening.xlora or opening.anymoe:
            raise InvalidRequest("adapters are measured with requests: give -c 1 too")
        prepared = prepare(opening)
        return Bench(
            prepared, plan, placement=place([prepared], opening)[0],
            threads=opening.threads, weights=opening.weights, progress=shown,
        )  # fmt: skip


def _counts(text: str | None) -> list[int]:
    counts = ("1" if text is None else text).split(",")
    if not all(count.isascii() and count.isdigit() and 0 < int(count) <= 1024 for count in counts):
        raise InvalidRequest(f"--concurrency is {text!r}; it must be numbers from 1 to 1024")
    return [int(count) for count in counts]


def _bench_load(flags: BenchFlags, selected: Selected) -> None:
    from squall.load import Load, over_http, run_all

    shape = (flags.repetitions, flags.prompt_tokens, flags.answer_tokens)
    loads = [Load(count, *shape) for count in _counts(flags.concurrency)]
    if flags.url is not None:
        reports = run_all(loads, over_http(flags.url, key=flags.api_key))
    else:
        reports = _ask_model(flags, selected, loads)
    if flags.as_json:
        typer.echo(json.dumps({"results": [asdict(report) for report in reports]}))
    else:
        show(_load_table(reports))
    if all(report.errors == report.requests for report in reports):
        raise typer.Exit(1)


def _ask_model(flags: BenchFlags, selected: Selected, loads: list[Load]) -> list[Report]:
    from squall.engine.engine import EngineConfig
    from squall.engine.memory import DEFAULT_CONTEXT
    from squall.load import TEMPLATE_ROOM, in_process, run_all

    most = max(load.concurrency for load in loads)
    tokens = max(load.prompt_tokens + load.answer_tokens for load in loads)
    config = EngineConfig(max_seqs=min(most, 64), prefix_cache_n=0)
    room = config.max_seqs * (tokens + TEMPLATE_ROOM)
    context = None if tokens < DEFAULT_CONTEXT else tokens
    others = Opening(context=context, kv_tokens=room, engine=config)
    with flags.open(selected, others) as model:
        if tokens > model.context:
            raise InvalidRequest(f"{tokens} tokens do not fit the context of {model.context}")
        return run_all(loads, in_process(model))


def _load_table(reports: list[Report]) -> Table:
    latencies = [f"{what} p{p}" for what in ("first", "next") for p in (50, 95, 99)]
    headings = ("at a time", "requests", "errors", "tokens/s", *latencies)
    guessed = [(report.accepted_tokens, report.guessed_tokens) for report in reports]
    title, caption = None, "milliseconds to a request's first text, and between texts"
    if any(all_ for _, all_ in guessed):
        title = f"guesses right: {', '.join(f'{a} of {all_}' for a, all_ in guessed)}"
    rows = []
    for report in reports:
        found = [1e3 * seconds for seconds in (*report.first_s.values(), *report.gap_s.values())]
        rates = (f"{rate:.1f}" for rate in (report.answer_tokens_per_second, *found))
        rows.append((report.concurrency, report.requests, report.errors, *rates))
        if report.first_error is not None:
            caption = f"an error: {report.first_error}"
    return table(headings, rows, headings, title=title, caption=caption)


def _report(
    opened: Bench, results: list[Result], profiles: list[Profile], roofline: Roofline | None
) -> dict[str, object]:
    from squall import __version__

    report = {
        "squall": __version__,
        "model": str(opened.checkpoint.path),
        "architecture": opened.architecture,
        "file_bytes": opened.checkpoint.size_bytes,
        "weight_bytes": opened.executor.weight_bytes,
        "threads": opened.executor.threads,
        "isa": opened.executor.isa,
        "results": [asdict(r) | {"mean": r.mean, "deviation": r.deviation} for r in results],
    }
    if not profiles:
        return report
    tests = []
    for found in profiles:
        limits = [roofline and roofline.limit_s(phase) for phase in found.phases]
        phases = [
            asdict(phase) | {"limit_s": limit}
            for phase, limit in zip(found.phases, limits, strict=True)
        ]
        tests.append(asdict(found) | {"phases": phases})
    return report | {"roofline": roofline and asdict(roofline), "profiles": tests}


def _rates_table(opened: Bench, results: list[Result]) -> Table:
    executor = opened.executor
    numbers = ("MiB", "tokens/s", "ms/token")
    rows = [
        (
            opened.checkpoint.path.name,
            result.test,
            f"{executor.weight_bytes / 2**20:.0f}",
            f"{result.mean:.1f} ± {result.deviation:.1f}",
            f"{1000 / result.mean:.2f}",
        )
        for result in results
    ]
    caption = f"{executor.threads} threads, {executor.isa}"
    return table(("model", "test", *numbers), rows, numbers, caption=caption)


def _profile_table(found: Profile, roofline: Roofline | None) -> Table:
    numbers = ("ms", "share", "waiting", "MB", "GB/s", "GMAC/s", "of limit")
    caption = f"one step of {found.steps}: {1e3 * found.elapsed_s / found.steps:.2f} ms."
    if roofline is not None:
        caption += (
            f" Limits: {roofline.bytes / 1e9:.1f} GB/s, {roofline.dots / 1e9:.0f} GMAC/s of int8, "
            f"{roofline.fmas / 1e9:.0f} of float32"
        )
    rows = []
    for phase in found.phases:
        if phase.elapsed_s == 0:
            continue
        products = phase.dots + phase.fmas
        limit = 0.0 if roofline is None else roofline.limit_s(phase)
        rows.append(
            (
                phase.name,
                f"{1e3 * phase.elapsed_s / found.steps:.3f}",
                f"{phase.elapsed_s / found.elapsed_s:.1%}",
                f"{phase.waiting_s / phase.elapsed_s:.0%}",
                _number(phase.bytes / found.steps / 1e6),
                _number(phase.bytes / phase.elapsed_s / 1e9),
                _number(products / phase.elapsed_s / 1e9),
                f"{limit / phase.elapsed_s:.0%}" if limit else "",
            )
        )
    return table((found.test, *numbers), rows, numbers, caption=caption)


def _number(x: float) -> str:
    return f"{x:.1f}" if x else ""
