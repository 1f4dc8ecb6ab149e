"""Every number format at one shape: rates of a prompt and of an answer, with random weights.

`of bound` is the share of what reading the weights' bytes once a token would allow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from random_gguf import SHAPES, WRITABLE, write
from squall import _native
from squall.measure import Bench, Plan


def measured(path: Path, plan: Plan, rounds: int, threads: int) -> dict[str, Any]:
    """Medians of one file; memory is measured in each round, as it changes."""
    bench = Bench.open(path, plan, threads=threads)
    prompts, answers, shares = [], [], []
    for _ in range(rounds):
        prompt, answer = (result.tokens_per_second[0] for result in bench.rates(1))
        prompts.append(prompt)
        answers.append(answer)
        shares.append(answer * bench.executor.weight_bytes / _native.read_bandwidth(threads))
    return {
        "weight_bytes": bench.executor.weight_bytes,
        "prompt": statistics.median(prompts),
        "answer": statistics.median(answers),
        "of_bound": statistics.median(shares),
    }


def main() -> None:
    """Measure each format and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="default: all")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_native.default_threads()[0])
    parser.add_argument("-p", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("-g", type=int, default=64, help="tokens of the answer")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    found = {}
    for name in args.formats or WRITABLE:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.gguf"
            write(path, SHAPES[args.shape], name)
            plan = Plan(args.p, args.g)
            found[name] = measured(path, plan, args.rounds, args.threads)
    if args.json:
        print(json.dumps(found))
        return
    table = Table(caption=f"{args.shape}, {args.threads} threads")
    for heading in ("format", "MiB", f"pp{args.p}", f"tg{args.g}", "of bound"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for name, row in found.items():
        rates = (f"{row['prompt']:.1f}", f"{row['answer']:.1f}", f"{row['of_bound']:.0%}")
        table.add_row(name, f"{row['weight_bytes'] / 2**20:.0f}", *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
