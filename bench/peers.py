"""Squall beside llama.cpp: the same file, machine and number of threads, in alternating rounds.

Rates are tokens per second: of a prompt, of an answer after it, of both with a long prompt, and of
several sequences that decode together. A ratio above 1 is in favour of Squall; it is taken round by
round, as machines get faster and slower, and its median told with the extremes. `of bound` is the
share of what reading the file's bytes once a token would allow.

llama.cpp is its Python package, built once for this machine into an environment of its own, which
takes minutes; PEERS_HOME says where. With `--isa avx2` both sides use no more than AVX2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from squall import _native, embedded

HERE = Path(__file__).parent
PACKAGE = "llama-cpp-python==0.3.36"
# Of each instruction set: the environment's name and how llama.cpp is built.
BUILDS = {
    None: ("llama-cpp", "-DGGML_NATIVE=ON"),
    "avx2": (
        "llama-cpp-avx2",
        "-DGGML_NATIVE=OFF -DGGML_AVX512=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON "
        "-DGGML_F16C=ON -DGGML_BMI2=ON",
    ),
}
WARM_UP = 4096  # a longer prompt warms itself up
Results = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table: how to read it off a worker's result."""

    name: str
    read: Callable[[Results], float]
    smaller_is_better: bool = False
    bound: bool = False  # by memory: one sequence, a token a step

    def ratio(self, ours: Results, theirs: Results) -> float:
        """How many times as good Squall is."""
        a, b = self.read(ours), self.read(theirs)
        return b / a if self.smaller_is_better else a / b


def rows(plans: list[list[int]]) -> list[Row]:
    """Every line; a plan has two."""
    found = []
    for i, (prompt, answer, batch) in enumerate(plans):
        many = f" x{batch}" if batch > 1 else ""
        found.append(Row(f"pp{prompt}{many}", lambda r, i=i: r["rates"][i][0]))
        name = f"tg{answer} after {prompt}{many}"
        found.append(Row(name, lambda r, i=i: r["rates"][i][1], bound=batch == 1))
    found.append(Row("load s", lambda r: r["load_s"], smaller_is_better=True))
    found.append(Row("RssAnon MiB", lambda r: r["memory"]["RssAnon"] / 2**20, True))
    found.append(Row("Rss MiB", lambda r: sum(r["memory"].values()) / 2**20, True))
    return found


def peer_python(isa: str | None) -> Path:
    """The Python that has llama.cpp; its environment is made if it is missing."""
    name, options = BUILDS[isa]
    home = Path(os.environ.get("PEERS_HOME") or Path.home() / ".cache/squall-peers") / name
    python = home / "bin/python"
    if python.exists():
        found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
        if found.returncode == 0:
            return python
    print(f"building llama.cpp in {home}, once; it takes minutes ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    # From its cache pip would take a wheel that was built with other options.
    install = [python, "-m", "pip", "install", "-q", "--no-cache-dir", PACKAGE]
    env = os.environ | {"CMAKE_ARGS": options}
    subprocess.run(install, check=True, env=env, stdout=sys.stderr)
    return python


def run_worker(python: str | Path, script: str, job: Results, isa: str | None) -> Results:
    """What a worker printed on its last line."""
    env = os.environ | ({"SQUALL_ISA": isa} if isa else {})
    command = [str(python), str(HERE / script), json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    result: Results = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(job: Results, rounds: int, isa: str | None) -> list[tuple[Results, Results]]:
    """(Squall, llama.cpp) of each round; who begins alternates."""
    sides = [(sys.executable, "squall_worker.py"), (peer_python(isa), "llama_worker.py")]
    found = []
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        results = {side: run_worker(*sides[side], job, isa) for side in order}
        found.append((results[0], results[1]))
    return found


def summary(job: Results, rounds: list[tuple[Results, Results]]) -> list[Results]:
    """Medians of every row, and of the ratios taken round by round."""
    file_bytes = os.path.getsize(job["model"])
    found = []
    for row in rows(job["plans"]):
        ratios = [row.ratio(*pair) for pair in rounds]
        line = {
            "name": row.name,
            "squall": statistics.median(row.read(ours) for ours, _ in rounds),
            "llama.cpp": statistics.median(row.read(theirs) for _, theirs in rounds),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        if row.bound:
            shares = [row.read(ours) * file_bytes / ours["bandwidth"] for ours, _ in rounds]
            line["of_bound"] = statistics.median(shares)
        found.append(line)
    return found


def print_table(report: Results) -> None:
    """One model, for people."""
    table = Table(title=Path(report["model"]).name)
    for heading in ("", "squall", "llama.cpp", "ratio", "from", "to", "of bound"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for line in report["rows"]:
        ratios = (line["ratio"], min(line["ratios"]), max(line["ratios"]))
        bound = f"{line['of_bound']:.0%}" if "of_bound" in line else ""
        sides = (f"{line['squall']:.4g}", f"{line['llama.cpp']:.4g}")
        table.add_row(line["name"], *sides, *(f"{ratio:.2f}" for ratio in ratios), bound)
    ours, theirs = report["rounds"][0]
    bandwidths = [ours["bandwidth"] / 1e9 for ours, _ in report["rounds"]]
    table.caption = (
        f"{report['threads']} threads, {len(bandwidths)} rounds, {min(bandwidths):.1f} to "
        f"{max(bandwidths):.1f} GB/s\n{ours['system']}; {theirs['system'].replace(' = 1 |', '')}"
    )
    Console(width=100).print(table)


def main() -> None:
    """Measure each model, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL.gguf", help="default: the default one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_native.default_threads()[0])
    parser.add_argument("--isa", choices=[isa for isa in BUILDS if isa])
    parser.add_argument("-p", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("-g", type=int, default=128, help="tokens of the answer")
    parser.add_argument("-d", type=int, default=4096, help="tokens of the long prompt; 0: none")
    parser.add_argument("-b", type=int, default=16, help="sequences decoding together; 1: none")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    plans = [[args.p, args.g, 1]]
    plans += [[args.d, args.g, 1]] if args.d else []
    plans += [[max(args.p // 4, 1), max(args.g // 2, 1), args.b]] if args.b > 1 else []
    reports = []
    for model in args.models or [str(embedded.find())]:
        job = {"model": model, "threads": args.threads, "plans": plans, "warm_up": WARM_UP}
        rounds = compare(job, args.rounds, args.isa)
        reports.append(job | {"rows": summary(job, rounds), "rounds": rounds})
        if not args.json:
            print_table(reports[-1])
    if args.json:
        print(json.dumps(reports))


if __name__ == "__main__":
    main()
