"""Compiles what is launched, for GPUs that need not be there; prints what came of it as JSON.

`python compiling.py 90 bf16` runs every case below with tensors on the CPU. Instead of a launch,
the kernel is compiled for compute capability 9.0, with the types and alignments of the arguments.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from asking import Products
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from squall import program as p
from squall.batch import Sequences
from squall.gpu import attention, triton_attention, triton_linear
from squall.gpu import triton_rows as rows
from squall.gpu.matrices import Float8, Packed, Plain, Weight

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
products = Products(triton_linear)


class Absent(DriverBase):  # type: ignore[misc]
    """The driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def packed(
    shape: tuple[int, int, int], bits: tuple[int, int], middle: int, group: int, least: bool
) -> Packed:
    """Of super-blocks of 256. least: with minimums."""
    experts, rows, cols = shape
    low, high = (
        torch.zeros(experts, rows, cols * b // 8, dtype=torch.uint8) if b else None for b in bits
    )
    assert low is not None
    base = torch.zeros(experts, rows, cols // 256, dtype=torch.float16)
    part = torch.zeros(experts, rows, cols // group, dtype=torch.uint8)
    more = (base.clone(), part.clone()) if least else (None, None)
    return Packed(
        "", experts, rows, cols, cols, low, bits[0], high, bits[1], middle, 256, group, base, part,
        *more,
    )  # fmt: skip


def q4_k(rows: int, cols: int, experts: int = 1) -> Packed:
    return packed((experts, rows, cols), (4, 0), 0, 32, least=True)


def q6_k(rows: int, cols: int, experts: int = 1) -> Packed:
    return packed((experts, rows, cols), (4, 2), 32, 16, least=False)


def plain(rows: int, cols: int, dtype: torch.dtype) -> Plain:
    return Plain("", 1, rows, cols, torch.zeros(1, rows, cols, dtype=dtype))


def float8(rows: int, cols: int) -> Float8:
    values = torch.zeros(1, rows, cols).to(torch.float8_e4m3fn)
    return Float8("", 1, rows, cols, values, torch.zeros(1, rows))


def linear_cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Every tile, with weights of one and of two planes."""
    weights: dict[str, Weight] = {
        "plain": plain(4096, 2048, dtype),
        "q4_k": q4_k(4096, 2048),
        "q6_k": q6_k(4096, 2048),
    }
    cases: dict[str, Callable[[], object]] = {}
    for name, w in weights.items():
        for n in (1, 16, 64, 512):
            for exact in (True, False):
                x = torch.zeros(n, 2048, dtype=dtype)
                key = f"{name} of {n}{' exact' if exact else ''}"
                cases[key] = lambda x=x, w=w, exact=exact: products.linear(x, w, exact=exact)
    one, some, many = (torch.zeros(n, 2048, dtype=dtype) for n in (1, 16, 512))
    w, other = q4_k(4096, 2048), q6_k(4096, 2048)
    for exact in (True, False):
        for x in (one, some, many):
            cases[f"gated {len(x)} {exact}"] = lambda x=x, exact=exact: products.gated(
                x, w, other, activation="silu", exact=exact
            )
    eight, down = q4_k(1024, 2048, 8), q6_k(2048, 1024, 8)
    for x in (one, many):
        cases[f"experts of {len(x)}"] = lambda x=x: products.experts(
            x, torch.zeros(len(x), 2, dtype=torch.int32), torch.zeros(len(x), 2),
            gate=eight, up=eight, down=down, activation="silu", exact=False,
        )  # fmt: skip
    cases["float8"] = lambda: products.linear(some, float8(4096, 2048), exact=True)
    cases["q3_k"] = lambda: products.linear(
        one, packed((1, 4096, 2048), (2, 1), 4, 16, least=False), exact=False
    )
    ids = torch.zeros(3, dtype=torch.int32)
    cases["embed"] = lambda: products.embed(ids, q4_k(4096, 2048), scale=1.0, dtype=dtype)
    return cases


def row_cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Norms of rows and of heads, both kinds of rotation."""
    x, weight = torch.zeros(3, 4096, dtype=dtype), torch.zeros(4096)
    return {
        "rms": lambda: rows.normalize(x, weight, None, "rms", 1e-5, 4096),
        "heads": lambda: rows.normalize(x, weight[:128], None, "rms", 1e-5, 128),
        "layer": lambda: rows.normalize(x, weight, weight, "layer", 1e-5, 4096),
        "halves": lambda: rows.rotate(x, torch.zeros(3, 128), 32, 128, False),
        "pairs": lambda: rows.rotate(x, torch.zeros(3, 64), 32, 128, True),
    }


def attention_cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """An answer, in parts, and a prompt, at every width; blocks of 16 and of 32."""
    cases: dict[str, Callable[[], object]] = {}
    for dim, size in ((64, 32), (80, 16), (96, 16), (128, 16), (256, 16)):
        x = p.Value(0, "x", 8 * dim)
        op = p.Attend(x, x, x, x, p.Index("", axes=2), 0, 8, 2, dim, 0.1, None, None)
        cache = attention.Cache(64 * size, p.CacheLayer(2, dim), dtype, torch.device("cpu"))
        for n in (1, 64):
            sequences = Sequences(
                positions=np.arange(600, 600 + n, dtype=np.int32),
                bounds=np.array([0, n], np.int32),
                block_tables=np.zeros((1, 64), np.int32),
            )
            arrays, shape = attention.layout(sequences, size)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            placed = attention.Rows(tensors, shape, size)
            q, spans = torch.zeros(n, 8 * dim, dtype=dtype), torch.zeros(2, n, dtype=torch.int32)
            for exact in (True, False):
                cases[f"attend {dim} of {n}{' exact' if exact else ''}"] = (
                    lambda a=(op, q, cache, spans, placed), exact=exact: triton_attention.attend(
                        *a, exact=exact
                    )
                )
        new = torch.zeros(n, 2 * dim, dtype=dtype)
        cases[f"store {dim}"] = lambda a=(cache, new, new, placed): triton_attention.store(*a)
    return cases


CASES = (linear_cases, row_cases, attention_cases)


def describe(kernel: Any) -> dict[str, object]:
    """What the compiler made: sizes, and which instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": kernel.metadata.shared,
        "multiply": sorted(set(re.findall(r"wgmma\.mma_async\S+|(?<!w)mma\.sync\S+", ptx))),
        "wide": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx)),
    }


def main(capability: int, type: str, wanted: str = "") -> None:
    """Compiles cases whose names match `wanted`; a line of JSON for each kernel."""
    triton.runtime.driver.set_active(Absent(capability))
    triton_linear._has_warpgroups = lambda _: capability >= 90  # type: ignore[assignment]
    made: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compiled(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options | {"warmup": True})
        made.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compiled
    for cases in CASES:
        for case, launch in cases(TYPES[type]).items():
            if not re.search(wanted, case):
                continue
            made.clear()
            launch()
            for name, kernel in made:
                line = {"case": case, "kernel": name} | describe(kernel)
                sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
