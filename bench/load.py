"""Load time and memory of a GGUF model: from process start to ready, in fresh processes.

The file is in the page cache but for the first round, which is not counted. Memory is the largest
sample of the process's anonymous pages (weights, cache and buffers; Linux only), and of the file's.
A virtual machine may give freed memory back to its host, and touching it again then costs more than
packing: with a --pause of some seconds before each round that is measured too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = dict[str, Any]

# Functions of the module `squall.assembly` that are stages of `Model.open`.
STAGES = {
    "header": "open_checkpoint",
    "recipe": "recipes.load",
    "program": "decoder.compile",
    "tokenizer": "open_tokenizer",
    "executor": "executors.open",
}


def load(path: str, threads: int | None) -> Report:
    """Load a model in this process: seconds of the stages and of `Model.open`, and sizes."""
    start_s = time.perf_counter()
    import squall.assembly
    import squall.model

    seconds: dict[str, float] = {"import": time.perf_counter() - start_s}
    for stage, function in STAGES.items():
        _time(squall.assembly, function, stage, seconds)
    packed_s = [0.0]
    open_s = time.perf_counter()
    model = squall.model.Model.open(
        path, threads=threads, progress=lambda *_: packed_s.append(time.perf_counter())
    )
    end_s = time.perf_counter()
    # The executor is made once the weights are packed, and is what remains of its stage.
    rest_s = seconds.pop("executor")
    seconds["weights"] = rest_s - (end_s - packed_s[-1])
    seconds["executor"] = end_s - packed_s[-1]
    return {
        "stages_s": seconds,
        "open_s": end_s - open_s,
        "file_bytes": model.checkpoint.size_bytes,
        "weight_bytes": model.executor.weight_bytes,
        "threads": model.executor.threads,
    }


def _time(module: Any, function: str, stage: str, seconds: dict[str, float]) -> None:
    *owners, name = function.split(".")
    owner = module
    for attribute in owners:
        owner = getattr(owner, attribute)
    timed: Callable[..., Any] = getattr(owner, name)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return timed(*arguments, **named)
        finally:
            seconds[stage] = time.perf_counter() - start_s

    setattr(owner, name, wrapper)


def measure(path: str, threads: int | None) -> Report:
    """Load in a process of its own; its report, with `ready_s` and the peaks of its memory."""
    command = [sys.executable, __file__, path, "--child"]
    command += [] if threads is None else ["--threads", str(threads)]
    peak = {"RssAnon": 0, "RssFile": 0}
    start_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            _sample(Path(f"/proc/{process.pid}/status"), peak)
            time.sleep(0.005)
        assert process.stdout is not None
        text = process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    report: Report = json.loads(text)
    report["ready_s"] = report.pop("ready_at_s") - start_s
    return report | {"peak_anon_bytes": peak["RssAnon"], "peak_file_bytes": peak["RssFile"]}


def _sample(status: Path, peak: dict[str, int]) -> None:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name in peak:
            peak[name] = max(peak[name], int(value.split()[0]) * 1024)


def summary(rounds: list[Report]) -> Report:
    """Medians of the times, the largest of the peaks."""

    def median(value: Callable[[Report], float]) -> float:
        return statistics.median(value(r) for r in rounds)

    ready_s, size = median(lambda r: r["ready_s"]), rounds[0]["file_bytes"]
    stages = rounds[0]["stages_s"]
    return {
        **{key: rounds[0][key] for key in ("file_bytes", "weight_bytes", "threads")},
        "rounds": len(rounds),
        "ready_s": ready_s,
        "open_s": median(lambda r: r["open_s"]),
        "gb_per_s": size / ready_s / 1e9,
        "peak_anon_bytes": max(r["peak_anon_bytes"] for r in rounds),
        "peak_file_bytes": max(r["peak_file_bytes"] for r in rounds),
        "stages_s": {name: median(lambda r, name=name: r["stages_s"][name]) for name in stages},
    }


def _print(found: Report) -> None:
    size = found["file_bytes"]
    print(f"file            {size / 1e6:.0f} MB, {found['threads']} threads")
    print(f"ready           {found['ready_s']:.3f} s, {found['gb_per_s']:.2f} GB/s")
    for name, seconds in {**found["stages_s"], "Model.open": found["open_s"]}.items():
        print(f"  {name:13} {seconds:.3f} s, {100 * seconds / found['ready_s']:.0f} %")
    for name in ("anon", "file"):
        peak = found[f"peak_{name}_bytes"]
        print(f"peak {name:10} {peak / 1e6:.0f} MB, {peak / size:.2f} x the file")


def main() -> None:
    """Print the medians, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--pause", type=float, default=0, help="seconds before each round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        report = load(arguments.model, arguments.threads)
        print(json.dumps(report | {"ready_at_s": time.perf_counter()}))
        return
    rounds = []
    for _ in range(arguments.rounds + 1):
        time.sleep(arguments.pause)
        rounds.append(measure(arguments.model, arguments.threads))
    found = summary(rounds[1:])
    if arguments.json:
        print(json.dumps(found))
    else:
        _print(found)


if __name__ == "__main__":
    main()
