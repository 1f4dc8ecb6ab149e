"""Every number format at one shape: rates of a prompt and of an answer, with random weights.

`of bound` is the share of what reading the weights' bytes once a token would allow, `of peak` that
of the multiply-accumulates which the processor can do. Both limits are measured in each round.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from random_gguf import SHAPES, Shape, fields, matrices, norms
from roofline import random_blocks
from squall import _native, quant, recipes
from squall.checkpoints import Checkpoint, Tensor
from squall.checkpoints.base import ByteTensor, Deferred
from squall.measure import Bench, Workload

HEADINGS = ("format", "MiB", "prompt", "of peak", "answer", "of bound")


def random_checkpoint(shape: Shape, format_name: str, *, normal: bool = False) -> Checkpoint:
    """A model that is in no file: its weights are made when they are packed.

    normal: of weights as they are in models, in place of any bytes.
    """
    format = quant.FORMATS[format_name]
    rng = np.random.default_rng(0)
    if normal:
        values = rng.standard_normal(1 << 22, np.float32) * np.float32(0.02)
        blocks = format.quantize(values).view(np.uint8).reshape(-1)
    else:
        size = (1 << 24) // format.block_bytes * format.block_bytes
        blocks = random_blocks(rng, size)
    tensors: dict[str, Tensor] = {
        name: Deferred(
            name,
            format_name,
            (rows, cols),
            functools.partial(np.resize, blocks, rows * format.row_bytes(cols)),
        )
        for name, rows, cols in matrices(shape)
    }
    ones = np.ones(shape.hidden, np.float32).view(np.uint8)
    for name in norms(shape):
        tensors[name] = ByteTensor(name, "f32", (shape.hidden,), ones)
    metadata = {f"llama.{key}": value for key, value in fields(shape, 32768).items()}
    return Checkpoint(
        Path(format_name),
        MappingProxyType({"general.architecture": "llama", **metadata}),
        MappingProxyType(tensors),
        sum(tensor.nbytes for tensor in tensors.values()),
    )


def measured(
    shape: Shape, format_name: str, load: Workload, rounds: int, threads: int
) -> dict[str, Any]:
    """Medians of one format."""
    checkpoint = random_checkpoint(shape, format_name)
    prepared = checkpoint, recipes.load(checkpoint), quant.Plan()
    bench = Bench(prepared, load, threads=threads)
    isa, weight_bytes = bench.executor.isa, bench.executor.weight_bytes
    every = sum(rows * cols for _, rows, cols in matrices(shape))
    products = every - 2 * shape.vocab * shape.hidden  # logits are of the last token alone
    is_float = quant.FORMATS[format_name].block == 1
    found: dict[str, list[float]] = {heading: [] for heading in HEADINGS[2:]}
    for _ in range(rounds):
        prompt, answer = (result.tokens_per_second[0] for result in bench.rates(1))
        peak = _native.peak_rates(isa, threads)[is_float]
        bound = _native.read_bandwidth(threads) / weight_bytes
        shares = (prompt, prompt * products / peak, answer, answer / bound)
        for heading, value in zip(found, shares, strict=True):
            found[heading].append(value)
    medians = {heading: statistics.median(values) for heading, values in found.items()}
    return {"format": format_name, "MiB": weight_bytes / 2**20, **medians}


def main() -> None:
    """Measure each format and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="default: all")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_native.default_threads()[0])
    parser.add_argument("-p", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("-g", type=int, default=64, help="tokens of the answer")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each format")
    args = parser.parse_args()
    unknown = set(args.formats) - set(quant.FORMATS)
    if unknown:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(quant.FORMATS)}")
    table = Table(caption=f"{args.shape}, {args.threads} threads, tokens/s")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "format" else "right")
    shape, load = SHAPES[args.shape], Workload(args.p, args.g)
    for name in track(args.formats or quant.FORMATS, console=Console(stderr=True)):
        row = measured(shape, name, load, args.rounds, args.threads)
        if args.json:
            print(json.dumps(row), flush=True)
        rates = (f"{row['prompt']:.1f}", f"{row['of peak']:.0%}")
        answers = (f"{row['answer']:.1f}", f"{row['of bound']:.0%}")
        table.add_row(name, f"{row['MiB']:.0f}", *rates, *answers)
    if not args.json:
        Console().print(table)


if __name__ == "__main__":
    main()
