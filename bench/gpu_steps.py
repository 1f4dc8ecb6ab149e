"""What needs a GPU, in less than eight minutes: `bench/gpu.sh [--small] [STEP...]`.

Each step is a process of its own with a time of its own; what it told before it failed or ran out
of time counts. A table comes last; all of it is in $OUT/gpu.json, what steps printed in $OUT/log.
Models have the shape of Llama 3 8B and random weights. --small: the same in miniature on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent
# Not tests/gpu, whose kernels are interpreted wherever they run.
TESTS = (
    "tests/executors/test_exact_on_device.py", "tests/parity/test_parity.py",
    "tests/parity/test_mixed_formats.py", "tests/engine/test_engine.py",
    "tests/engine/test_adapters.py",
)  # fmt: skip
TOTAL_S = float(os.environ.get("SQUALL_GPU_S", "460"))
SMALL = os.environ.get("SQUALL_GPU_SMALL") == "1"
DEVICE = "torch" if SMALL else "cuda:0"
SHAPE = "tiny" if SMALL else "8b"
PROMPT, ANSWER, TOGETHER = (64, 4, 8) if SMALL else (4096, 64, 64)
# What the rates are to reach: of bandwidth and of the rate of products, and times one sequence.
DECODE, PREFILL, TIMES = {"bf16": 0.75, "q4_k": 0.60}, 0.50, 25.0
OF_BOUND, SCALES = 0.85, 11.0  # of the CPU

Row = dict[str, Any]


def tell(name: str, value: float, unit: str, **more: float) -> None:
    """A line of the table. share: of a limit, or times something. least: what it is to be."""
    print("ROW " + json.dumps({"name": name, "value": value, "unit": unit, **more}), flush=True)


def timed(run: Callable[[], object], rounds: int = 5) -> float:
    """The median of seconds, after one round to warm up."""
    found = []
    for _ in range(rounds + 1):
        start_s = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - start_s)
    return statistics.median(found[1:])


def wait() -> None:
    """Until the device has done what it was given."""
    import torch

    if DEVICE != "torch":
        torch.cuda.synchronize()


def torch_device() -> Any:
    """As PyTorch calls it."""
    import torch

    return torch.device("cpu" if DEVICE == "torch" else DEVICE)


# ---- steps ----


def ceilings() -> None:
    """Bytes and products a second, by PyTorch."""
    import torch

    count, size = (1 << 22, 256) if SMALL else (1 << 31, 8192)
    new = partial(torch.randn, dtype=torch.bfloat16, device=torch_device())
    source = new(count // 2)
    target = torch.empty_like(source)
    seconds = timed(partial(target.copy_, source), 10)
    tell("copy", 2 * count / seconds / 1e9, "GB/s")
    a, b = new(size, size), new(size, size)
    seconds = timed(partial(torch.matmul, a, b), 10)
    tell("bf16 matmul", 2 * size**3 / seconds / 1e12, "TFLOP/s")


def tests() -> None:
    """Parity and exactness on the device."""
    paths = [path for path in TESTS if (ROOT / path).exists()]
    chosen = [paths[0], "-k", "often and q4_k"] if SMALL else paths
    # Workers compile kernels, each on a processor of its own; what is done in time is told.
    workers = ["-n", "12"] if not SMALL and find_spec("xdist") else []
    how = ["-q", "-W", "default", "--maxfail=40", "--session-timeout=80"]
    command = [sys.executable, "-m", "pytest", *how, *workers, *chosen]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"SQUALL_TEST_DEVICE": DEVICE},
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    print(done.stdout, flush=True)
    counts = done.stdout.strip().rsplit("\n", 1)[-1].replace(",", "").split()
    for number, kind in pairwise(counts):
        if kind in ("passed", "failed", "errors", "error", "skipped"):
            tell(f"tests {kind}", int(number), "")


def squall(format_name: str) -> None:
    """One sequence, a prompt, and many sequences; exact, and as fast as possible."""
    from random_gguf import SHAPES, matrices
    from squall import quant
    from squall.measure import Workload

    shape = SHAPES[SHAPE]
    every = sum(rows * cols for _, rows, cols in matrices(shape))
    products = 2 * (every - 2 * shape.vocab * shape.hidden)  # logits are of one row
    # A row sees half of the others on average: a product with its key, one with its value.
    products += 4 * PROMPT // 2 * shape.hidden * shape.layers
    table = shape.vocab * quant.FORMATS[format_name].row_bytes(shape.hidden)
    for exact in (True, False):
        name = f"{format_name}{' exact' if exact else ''}"
        start_s = time.perf_counter()
        bench = opened(format_name, Workload(2 * PROMPT - ANSWER, ANSWER, rows=PROMPT), exact)
        tell(f"{name}: load", time.perf_counter() - start_s, "s")
        bench.plan(Workload(0, ANSWER, depth=ANSWER))
        one = median(bench, 3)
        read = bench.executor.weight_bytes - table
        tell(f"{name}: 1 sequence", one, "tokens/s", bytes=one * read, least=DECODE[format_name])
        for rows in (PROMPT, PROMPT // 8):
            bench.plan(Workload(PROMPT, 0, rows=rows))
            rate = median(bench, 2)
            goal = {"least": PREFILL} if rows == PROMPT else {}
            tell(f"{name}: prompt, {rows} a step", rate, "tokens/s", flops=rate * products, **goal)
        bench.plan(Workload(0, ANSWER, depth=ANSWER // 2, batch=TOGETHER))
        rate = median(bench, 1)
        tell(f"{name}: {TOGETHER} sequences", rate, "tokens/s", share=rate / one, least=TIMES)
        bench.plan(Workload(0, ANSWER, depth=PROMPT))
        tell(f"{name}: after {PROMPT} tokens", median(bench, 1), "tokens/s")
        del bench


def opened(format_name: str, load: Any, exact: bool) -> Any:
    """A `Bench` of random weights on the device."""
    from formats import random_checkpoint
    from random_gguf import SHAPES
    from squall import quant, recipes
    from squall.executors import Placement
    from squall.executors.devices import Stage
    from squall.measure import Bench

    checkpoint = random_checkpoint(SHAPES[SHAPE], format_name, normal=True)
    placement, threads = Placement((Stage(DEVICE),), exact=exact), 1 if SMALL else None
    prepared = checkpoint, recipes.load(checkpoint), quant.Plan()
    return Bench(prepared, load, placement=placement, threads=threads)


def median(bench: Any, rounds: int) -> float:
    """Tokens a second of what is planned; two rounds warm up: graphs are made in the second."""
    bench.rates(1, warm_up=True)
    (result,) = bench.rates(rounds, warm_up=False)
    return statistics.median(result.tokens_per_second)


def transformers() -> None:
    """The same shape by transformers: bfloat16, SDPA; then compiled, with a static cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    from random_gguf import SHAPES

    shape, device = SHAPES[SHAPE], torch_device()
    config = LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, vocab_size=shape.vocab,
        intermediate_size=shape.feed_forward, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=4 * PROMPT,
        attn_implementation="sdpa", dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.inference_mode(), device:
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(0, shape.vocab, (1, PROMPT))
        seconds = timed(lambda: model(ids, use_cache=True, logits_to_keep=1), 2)
        tell("transformers bf16: prompt", PROMPT / seconds, "tokens/s")

        def decode(forward: Callable[..., Any], batch: int) -> float:
            cache = StaticCache(config=config, max_cache_len=4 * ANSWER)
            start, token = torch.tensor([ANSWER]), ids[:, :1].repeat(batch, 1).contiguous()

            def step() -> None:
                forward(token, past_key_values=cache, cache_position=start, use_cache=True)

            return batch / timed(step, 10)

        size = sum(p.nbytes for p in model.parameters()) - model.lm_head.weight.nbytes
        rate = decode(model, 1)
        tell("transformers bf16: 1 sequence", rate, "tokens/s", bytes=rate * size)
        rate = decode(model, TOGETHER)
        tell(f"transformers bf16: {TOGETHER} sequences", rate, "tokens/s")
        if not SMALL:
            compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
            rate = decode(compiled, 1)
            tell("transformers bf16, compiled: 1 sequence", rate, "tokens/s", bytes=rate * size)


def llama_cpp() -> None:
    """The same shape by llama.cpp, if llama-cpp-python is here, and has the GPU."""
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        print("llama-cpp-python or gguf is not here")
        return
    from peers import run_worker
    from random_gguf import SHAPES, write

    path = Path(os.environ.get("TMPDIR", "/tmp")) / "squall-gpu.gguf"
    write(path, SHAPES[SHAPE], "q4_k")
    job = {"model": str(path), "threads": len(os.sched_getaffinity(0)), "warm_up": PROMPT}
    job["plans"] = [[PROMPT, ANSWER, 1], [ANSWER, ANSWER, TOGETHER]]
    found = run_worker(sys.executable, "llama_worker.py", job, None)
    path.unlink()
    print(found["system"])
    for (kind, _, many), rates in zip(job["plans"], found["rates"], strict=True):
        tell(f"llama.cpp q4_k: prompt of {kind}", rates[0], "tokens/s")
        tell(f"llama.cpp q4_k: {many} sequences", rates[1], "tokens/s")


def scaling() -> None:
    """The native executor at 1, 2, 4, ... threads."""
    from scaling import compared

    more = ["--small", "--threads", "1"] if SMALL else []
    command = [sys.executable, str(HERE / "scaling.py"), "--json", *more]
    lines: list[Row] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        for text in running.stdout or ():
            lines.append(json.loads(text))
            line = compared(lines)[-1]
            name = f"CPU {line['model']}, {line['threads']} threads"
            of_bound = {"share": line["of_bound"]} if "of_bound" in line else {}
            tell(f"{name}: 1 sequence", line["answer"], "tokens/s", **of_bound)
            tell(f"{name}: a prompt", line["prompt"], "tokens/s", share=line["x"])
            tell(f"{name}: 16 sequences", line["together"], "tokens/s", share=line["x16"])
    done = [line for line in compared(lines) if "of_bound" in line]
    for model in dict.fromkeys(line["model"] for line in done):
        own = [line for line in done if line["model"] == model]
        best, last = max(own, key=lambda line: line["answer"]), own[-1]
        share, name = best["of_bound"], f"CPU {model}, best: 1 sequence"
        tell(name, best["answer"], "tokens/s", share=share, least=OF_BOUND)
        goal = {"least": SCALES} if last["threads"] == 16 else {}
        name = f"CPU {model}, {last['threads']} threads: prompt"
        tell(name, last["prompt"], "tokens/s", share=last["x"], **goal)


def profile() -> None:
    """Where the time of a step of one row and of a prompt goes: op by op, kernel by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from squall.measure import Workload

    activities = [ProfilerActivity.CPU, *([] if SMALL else [ProfilerActivity.CUDA])]
    by = "self_cpu_time_total" if SMALL else "self_device_time_total"
    for format_name in ("bf16", "q4_k"):
        bench = opened(format_name, Workload(PROMPT, 1, rows=PROMPT), exact=False)
        for load in (Workload(0, 1, depth=PROMPT // 2), Workload(PROMPT, 0, rows=PROMPT)):
            bench.plan(load)
            bench.rates(3)
            with profiler(activities=activities) as found:
                bench.rates(1, warm_up=False)
                wait()
            (ops,) = bench.profiles()
            print(f"---- {format_name}, {ops.test}: {ops.elapsed_s * 1e3:.2f} ms with a profile")
            for phase in ops.phases[:12]:
                rate = phase.bytes / max(phase.elapsed_s, 1e-9) / 1e9
                print(f"{phase.elapsed_s * 1e3:9.3f} ms {rate:8.1f} GB/s  {phase.name}")
            print(found.key_averages().table(sort_by=by, row_limit=14, max_name_column_width=60))
        del bench


# Seconds that a step may take, in the order of what they tell.
STEPS: dict[str, tuple[int, Callable[[], None]]] = {
    "ceilings": (30, ceilings),
    "q4_k": (75, partial(squall, "q4_k")),
    "bf16": (75, partial(squall, "bf16")),
    "tests": (110, tests),
    "scaling": (100, scaling),
    "profile": (60, profile),
    "transformers": (70, transformers),
    "llama.cpp": (70, llama_cpp),
}


# ---- all of them ----


def run_step(name: str, seconds: float, log: Any) -> tuple[list[Row], str]:
    """What a step told, and how it ended."""
    command = [sys.executable, str(Path(__file__)), "--step", name]
    log.write(f"\n======== {name}\n".encode())
    log.flush()
    rows: list[Row] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True
    )
    end = "ok"
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        text, _ = process.communicate()
        end = f"no end within {seconds:.0f} s"
    for line in text.splitlines():
        if line.startswith("ROW "):
            rows.append({"step": name, **json.loads(line[4:])})
        else:
            log.write(f"{line}\n".encode())
    log.flush()
    if end == "ok" and process.returncode:
        end = f"failed ({process.returncode})"
    return rows, end


def with_shares(rows: list[Row]) -> list[Row]:
    """Shares of the limits that were measured."""
    limits = {row["name"]: row["value"] for row in rows if row["step"] == "ceilings"}
    found = []
    for row in rows:
        for key, limit, unit in (("bytes", "copy", 1e9), ("flops", "bf16 matmul", 1e12)):
            if key in row and limit in limits:
                row = {**row, "share": row[key] / unit / limits[limit]}
        found.append(row)
    return found


def print_table(rows: list[Row], ends: dict[str, str]) -> None:
    """For people."""
    table = Table(box=None)
    for heading in ("", "", "", "share or times", "to reach"):
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    for row in rows:
        share, least = row.get("share"), row.get("least")
        told = "" if share is None else f"{share:.2f}"
        table.add_row(
            row["name"], f"{row['value']:.4g}", row["unit"], told,
            "" if least is None else f"{least:.2f}" + ("" if (share or 0) >= least else " MISSED"),
        )  # fmt: skip
    Console(width=110).print(table)
    print("; ".join(f"{name}: {end}" for name, end in ends.items()))


def main() -> None:
    """Run the steps, or in a process of its own one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--small", action="store_true", help="in miniature, on the CPU")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; steps are {', '.join(STEPS)}")
    if args.step:
        STEPS[args.step][1]()
        return
    if args.small:  # other programs' threads would be waited for
        os.environ |= {"SQUALL_GPU_SMALL": "1", "OMP_NUM_THREADS": "1"}
    end_s = time.monotonic() + TOTAL_S
    out = Path(os.environ.get("OUT") or ROOT / "build")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    ends: dict[str, str] = {}
    with (out / "log").open("wb") as log:
        for name in args.steps or STEPS:
            left_s = end_s - time.monotonic()
            if left_s < 10:
                ends[name] = "no time left"
                continue
            found, ends[name] = run_step(name, min(STEPS[name][0], left_s), log)
            rows += found
            print(f"{name}: {ends[name]}, {TOTAL_S - (end_s - time.monotonic()):.0f} s", flush=True)
            result = {"rows": with_shares(rows), "ends": ends}
            (out / "gpu.json").write_text(json.dumps(result, indent=1))
    print_table(with_shares(rows), ends)


if __name__ == "__main__":
    main()
