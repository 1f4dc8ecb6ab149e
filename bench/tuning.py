"""What `squall tune` expects beside what `squall bench` measures then, on the same machine.

    bench/tuning.py [MODEL...]

Models are files or folders, without any the default one. Each round measures both, in turn, and
tells by how much the expected rates are off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def told(*command: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "squall", *command, "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def compare(model: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Expected by measured, of prompts and of answers."""
    off: dict[str, list[float]] = {"prompt": [], "answer": []}
    for _ in range(rounds):
        choice = next(c for c in told("tune", *model)["choices"] if c["isq"] is None)
        results = told("bench", *model, "-r", "3")["results"]
        for kind, result in zip(off, results, strict=True):
            off[kind].append(choice[kind] / result["mean"])
            print(f"  {kind}: {choice[kind]:.1f} expected, {result['mean']:.1f} measured")
    return off


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for model in args.models or [None]:
        print(model or "the default model")
        for kind, ratios in compare([model] if model else [], args.rounds).items():
            low, high = min(ratios), max(ratios)
            print(f"{kind}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
