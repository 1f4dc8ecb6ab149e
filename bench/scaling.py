"""How the native executor scales with threads: SmolLM2's shape and a 1.1 B model, random weights.

Of each number of threads the rates of a prompt, of an answer after it, and of 16 answers together.
`of bound` is the share of what the machine's best bandwidth would allow to one answer, `of peak`
that of the multiply-accumulates of the same threads, `x` how many times one thread's rate that is.
If llama-cpp-python is here, it runs beside, from files of the same shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from formats import random_checkpoint
from random_gguf import SHAPES, matrices, write
from squall import _native, quant, recipes
from squall.measure import Bench, Workload

MODELS = {"SmolLM2-135M Q4_1": ("135m", "q4_1"), "1.1 B Q4_K": ("1.1b", "q4_k")}
SMALL = {"tiny Q4_K": ("tiny", "q4_k")}
HEADINGS = ("model", "threads", "GB/s", "prompt", "x", "of peak", "answer", "of bound", "16", "x16")
Line = dict[str, Any]


def doubled(most: int) -> list[int]:
    """1, 2, 4, ..., and last the most."""
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]


def sizes(small: bool) -> list[Workload]:
    """A prompt and its answer; answers together."""
    if small:
        return [Workload(16, 4), Workload(2, 2, batch=16)]
    return [Workload(512, 48), Workload(32, 16, batch=16)]


def lines(model: str, threads: list[int], small: bool) -> Iterator[Line]:
    """A line for each number of threads."""
    shape, format_name = (MODELS | SMALL)[model]
    checkpoint = random_checkpoint(SHAPES[shape], format_name, normal=True)
    every = sum(rows * cols for _, rows, cols in matrices(SHAPES[shape]))
    products = every - 2 * SHAPES[shape].vocab * SHAPES[shape].hidden  # logits are of one row
    for count in threads:
        one, many = sizes(small)
        bandwidth = _native.read_bandwidth(count)
        peak = _native.peak_rates(_native.default_isa(), count)[0]
        bench = Bench((checkpoint, recipes.load(checkpoint), quant.Plan()), one, threads=count)
        prompt, answer = (rate.mean for rate in bench.rates(1))
        bench = Bench((checkpoint, recipes.load(checkpoint), quant.Plan()), many, threads=count)
        together = bench.rates(1)[1].mean
        yield {
            "model": model, "threads": count, "bandwidth": bandwidth, "prompt": prompt,
            "answer": answer, "together": together, "of_peak": prompt * products / peak,
            "bytes": bench.executor.weight_bytes,
        }  # fmt: skip


def compared(found: list[Line]) -> list[Line]:
    """With shares of the best bandwidth that a model found, and of the rates of one thread."""
    told = []
    for line in found:
        own = [other for other in found if other["model"] == line["model"]]
        best = max(other.get("bandwidth", 0.0) for other in own)
        more = {"of_bound": line["answer"] * line["bytes"] / best} if best else {}
        more |= {"x": line["prompt"] / own[0]["prompt"]}
        told.append(line | more | {"x16": line["together"] / own[0]["together"]})
    return told


def peer(model: str, threads: list[int], small: bool) -> Iterator[Line]:
    """llama.cpp's rates."""
    from peers import run_worker

    shape, format_name = (MODELS | SMALL)[model]
    plans = [[load.prompt, load.answer, load.batch] for load in sizes(small)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, SHAPES[shape], format_name)
        for count in threads:
            job = {"model": str(path), "threads": count, "plans": plans, "warm_up": 4096}
            (prompt, answer), (_, together) = run_worker(
                sys.executable, "llama_worker.py", job, None
            )["rates"]
            yield {
                "model": f"{model}, llama.cpp", "threads": count, "prompt": prompt,
                "answer": answer, "together": together,
            }  # fmt: skip


def print_table(found: list[Line]) -> None:
    """For people."""
    table = Table(caption=f"tokens/s, {_native.default_isa()}")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for line in found:
        percent = {k: f"{line[k]:.0%}" if k in line else "" for k in ("of_peak", "of_bound")}
        times = {k: f"{line[k]:.1f}" if k in line else "" for k in ("x", "x16")}
        table.add_row(
            line["model"], str(line["threads"]),
            f"{line['bandwidth'] / 1e9:.0f}" if "bandwidth" in line else "",
            f"{line['prompt']:.1f}", times["x"], percent["of_peak"], f"{line['answer']:.1f}",
            percent["of_bound"], f"{line['together']:.1f}", times["x16"],
        )  # fmt: skip
    Console(width=110).print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--threads", type=int, nargs="*", default=doubled(most or 1))
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print lines of JSON as they come")
    args = parser.parse_args()
    sides = [lines, peer] if find_spec("llama_cpp") is not None else [lines]
    found: list[Line] = []
    for side in sides:
        for model in SMALL if args.small else MODELS:
            for line in side(model, args.threads, args.small):
                found.append(line)
                if args.json:
                    print(json.dumps(line), flush=True)
    if not args.json:
        print_table(compared(found))


if __name__ == "__main__":
    main()
