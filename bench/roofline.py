"""What this machine does at most, and how near to it the native core's matmuls come.

Reading memory, multiply-accumulates of int8 and of float32 on each instruction set, then one linear
op by itself in every number format, with random weights: activations made int8 where the format
wants it, then multiplied. The fastest of several passes each.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from squall import _native, quant


def peaks(threads: int) -> list[dict[str, Any]]:
    """Of each instruction set that this machine has."""
    rates = [(isa, *_native.peak_rates(isa, threads)) for isa in _native.isas()]
    return [{"isa": isa, "int8": int8, "float32": float32} for isa, int8, float32 in rates]


def random_blocks(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Bytes that are valid blocks of every format: its floats are finite and small."""
    return rng.integers(0, 256, size, np.uint8) & 0x3B


def linears(
    peak: dict[str, Any], threads: int, rows: int, shape: tuple[int, int], passes: int
) -> list[dict[str, Any]]:
    """The rate of every format, and its share of the peak rate that bounds it."""
    rng = np.random.default_rng(0)
    outputs, inputs = shape
    x = rng.standard_normal((rows, inputs), np.float32)
    found = []
    for name, format in quant.FORMATS.items():
        blocks = random_blocks(rng, outputs * format.row_bytes(inputs))
        tile = _native.pack(name, blocks, outputs, inputs)
        _, seconds = _native.timed_linear(x, tile, peak["isa"], threads, passes)
        rate = rows * inputs * outputs / seconds
        bound = "float32" if format.block == 1 else "int8"
        found.append({"format": name, "bound": bound, "rate": rate, "share": rate / peak[bound]})
    return found


def print_tables(report: dict[str, Any]) -> None:
    """The report for people."""
    console = Console()
    machine = Table(caption=f"{report['threads']} threads, {report['bandwidth'] / 1e9:.1f} GB/s")
    for heading in ("instructions", "int8 GMAC/s", "float32 GMAC/s"):
        machine.add_column(heading, justify="left" if heading == "instructions" else "right")
    for peak in report["peaks"]:
        machine.add_row(peak["isa"], f"{peak['int8'] / 1e9:.1f}", f"{peak['float32'] / 1e9:.1f}")
    console.print(machine)
    outputs, inputs = report["shape"]
    formats = Table(caption=f"{report['rows']} rows x {outputs}x{inputs}, {report['isa']}")
    for heading in ("format", "GMAC/s", "of peak", "bound"):
        formats.add_column(heading, justify="right" if heading in ("GMAC/s", "of peak") else "left")
    for linear in report["linears"]:
        rate, share = f"{linear['rate'] / 1e9:.1f}", f"{linear['share']:.0%}"
        formats.add_row(linear["format"], rate, share, linear["bound"])
    console.print(formats)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=_native.default_threads()[0])
    parser.add_argument("--isa", choices=_native.isas(), default=_native.default_isa())
    parser.add_argument("--rows", type=int, default=512, help="rows of activations")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    found = peaks(args.threads)
    (peak,) = (peak for peak in found if peak["isa"] == args.isa)
    report = {
        "threads": args.threads,
        "bandwidth": _native.read_bandwidth(args.threads),
        "peaks": found,
        "isa": args.isa,
        "rows": args.rows,
        "shape": tuple(args.shape),
        "linears": linears(peak, args.threads, args.rows, tuple(args.shape), args.passes),
    }
    if args.json:
        print(json.dumps(report))
    else:
        print_tables(report)


if __name__ == "__main__":
    main()
