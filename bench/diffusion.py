"""What pictures cost at real sizes: FLUX.1's transformer, T5-XXL and the autoencoder.

    python bench/diffusion.py step --format q4_k
    python bench/diffusion.py decode t5 offloaded

Weights are random, and matrices are parts of one buffer, so that nothing but memory is needed. Each
part is a process of its own and prints a line of JSON, with the most memory it took, in MiB.
`step` is a step of the transformer at --size: seconds, and of its integer products the share of
what this machine can do, all together and op by op (`dots`: of such products alone; a linear's
activations are made integers in a phase of their own). `offloaded` is the same with one block's
weights in memory at a time. `decode` is the decoder against diffusers' (torch, as many threads),
in alternating processes: seconds of a picture, and what it took beyond the weights. `t5` is a
prompt of --tokens. --small: the same in miniature.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roofline import random_blocks
from squall import encoder, executors
from squall.checkpoints.base import ByteTensor, Checkpoint, Tensor
from squall.diffusion import vae
from squall.executors import Limits, Placement
from squall.measure import Roofline
from squall.program import Names, Program, Slice
from squall.quant import FORMATS
from squall.roles import Network, roles
from squall.spec import Attention, AutoEncoder, Encoder, Flux, Layer, Mlp, Norm, Relative
from squall.weights import WeightStore

PARTS = ("step", "offloaded", "decode", "t5")
MIB = 2**20
Given = dict[str, NDArray[Any]]


# ---- models ----


def flux(given: argparse.Namespace) -> Flux:
    """FLUX.1-dev's, or a small one."""
    heads, size, text, pooled = (2, 32, 64, 32) if given.small else (24, 128, 4096, 768)
    double, single = (1, 2) if given.small else (19, 38)
    return Flux(
        patch=64, hidden=heads * size, heads=heads, head_dim=size,
        double=given.double or double, single=given.single or single, text=text, pooled=pooled,
        axes=(size // 8, size * 7 // 16, size * 7 // 16), mlp=4 * heads * size, guidance=True,
    )  # fmt: skip


def autoencoder(small: bool) -> AutoEncoder:
    widths, groups = ((32, 64), 8) if small else ((128, 256, 512, 512), 32)
    return AutoEncoder(16, widths, blocks=2, groups=groups, scale=0.3611, shift=0.1159)


def t5(small: bool) -> Encoder:
    """T5-XXL's encoder, of version 1.1."""
    hidden, heads, width, layers = (64, 2, 128, 2) if small else (4096, 64, 10240, 24)
    norm = Norm("rms", 1e-6)
    attention = Attention(heads, heads, hidden // heads, 1.0, None)
    layer = Layer(attention, Mlp(width, "gelu_tanh"), norm)
    return Encoder(32128, hidden, (layer,) * layers, norm, relative=Relative(32, 128))


def weights(network: Network, prefix: str, format_name: str) -> tuple[WeightStore, Names]:
    """Random ones for every role; matrices in a format, if their rows are whole blocks of it."""
    shapes = roles(network)
    rng, format = np.random.default_rng(0), FORMATS[format_name]
    flat = {role: (math.prod(s[:1]), math.prod(s[1:])) for role, s in shapes.items() if s[1:]}
    floats = max(math.prod(shape) for shape in shapes.values())
    blocked = [r * format.row_bytes(c) for r, c in flat.values() if not c % format.block]
    block = random_blocks(rng, max(blocked, default=0)) if format.block > 1 else None
    scaled = None
    tensors: dict[str, Tensor] = {}
    names: dict[str, tuple[Slice, ...]] = {}
    for role, shape in shapes.items():
        sizes = flat.get(role, shape)
        if block is not None and len(sizes) == 2 and not sizes[1] % format.block:
            view = block[: sizes[0] * format.row_bytes(sizes[1])]
            tensors[role] = ByteTensor(role, format_name, sizes, view)
        else:
            if scaled is None:
                count = floats if block is None else _rest(flat, shapes, format.block)
                scaled = rng.standard_normal(count, np.float32) * np.float32(0.02)
            bytes_ = scaled[: math.prod(sizes)].view(np.uint8)
            tensors[role] = ByteTensor(role, "f32", sizes, bytes_)
        names[prefix + role] = (Slice(role, 0, sizes[0]),)
    return WeightStore(Checkpoint(Path(), {}, tensors, 0)), names


def _rest(flat: Mapping[str, tuple[int, int]], shapes: Mapping[str, Any], block: int) -> int:
    """Values of the largest weight that has no blocks."""
    left = (math.prod(s) for role, s in shapes.items() if role not in flat or flat[role][1] % block)
    return max(left, default=0)


# ---- memory and time ----


def peak(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, the most memory of this process meanwhile, and the memory before; in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    return run(), _status("VmHWM"), before


def _status(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name)) / 1024


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """The median, after a round to warm up."""
    found = []
    for _ in range(rounds + 1):
        start_s = time.perf_counter()
        run()
        found.append(time.perf_counter() - start_s)
    return median(found[1:])


def opened(
    program: Program, store: WeightStore, inputs: Given, threads: int | None
) -> executors.Executor:
    rows = {value.rows: len(inputs[value.name]) for value in program.inputs}
    rows |= {index.rows: inputs[index.name].shape[-1] for index in program.indices}
    return executors.open(program, store, Limits(rows=rows), pool=executors.thread_pool(threads))


def measured(program: Program, store: WeightStore, inputs: Given, given: Any) -> dict[str, Any]:
    """Time and memory of a program, and where the time went."""
    executor, _, _ = peak(lambda: opened(program, store, inputs, given.threads))
    store.checkpoints.clear()
    _, most, before = peak(lambda: executor.run(inputs))
    told: dict[str, Any] = {
        "peak_mib": round(most), "weights_mib": round(executor.weight_bytes / MIB),
        "run_mib": round(most - before), "threads": executor.threads, "isa": executor.isa,
        "seconds": round(seconds(lambda: executor.run(inputs), given.rounds), 4),
    }  # fmt: skip
    phases = executor.profile(lambda: executor.run(inputs))
    limit = Roofline.of(executor.isa, executor.threads)
    times, least, dots = Counter[str](), Counter[str](), Counter[str]()
    for phase in phases:
        times[phase.name] += phase.elapsed_s  # type: ignore[assignment]
        least[phase.name] += limit.limit_s(phase)  # type: ignore[assignment]
        dots[phase.name] += phase.dots
    spent = sum(times[name] for name in dots if dots[name])
    rate = sum(dots.values()) / spent if spent else 0.0
    told |= {"int8_gmacs": round(rate / 1e9, 1), "int8_share": round(rate / limit.dots, 3)}
    told["ops"] = {
        name: {"s": round(elapsed, 5), "of_limit": round(least[name] / max(elapsed, 1e-9), 3)}
        for name, elapsed in times.most_common()
    }
    return told


# ---- parts ----


def of_step(given: argparse.Namespace) -> tuple[Program, WeightStore, Given]:
    from squall.diffusion import transformer

    spec, side = flux(given), given.size // 16
    store, names = weights(spec, "flux.", given.format)
    rng = np.random.default_rng(1)
    text = 16 if given.small else 512
    inputs: Given = dict(transformer.inputs(text, side, side))
    widths = {"picture": spec.patch, "text": spec.text, "pooled": spec.pooled}
    rows = {"picture": side * side, "text": text}
    for name, width in (widths | {"time": 256, "guidance": 256}).items():
        inputs[name] = rng.standard_normal((rows.get(name, 1), width), np.float32)
    return transformer.compile(spec, names), store, inputs


def step(given: argparse.Namespace) -> dict[str, Any]:
    return measured(*of_step(given), given)


def offloaded(given: argparse.Namespace) -> dict[str, Any]:
    from squall.diffusion.parts import Network as Part

    program, store, inputs = of_step(given)
    part = Part(program, store, Placement(), executors.thread_pool(given.threads), by_layer=True)

    def run() -> float:
        start_s = time.perf_counter()
        part.run(inputs, lambda: None)
        return time.perf_counter() - start_s

    elapsed_s, most, _ = peak(run)
    whole = sum(map(store.becomes, program.weights()))
    return {"seconds": round(elapsed_s, 4), "peak_mib": round(most), "all_mib": round(whole / MIB)}


def decode(given: argparse.Namespace) -> dict[str, Any]:
    spec = autoencoder(given.small)
    store, names = weights(spec, "vae.", "f32")
    side = given.size // 2 ** (len(spec.widths) - 1)
    inputs: Given = dict(vae.decoder_inputs(spec, side, side))
    inputs["latents"] = np.random.default_rng(1).standard_normal((side**2, 16), np.float32)
    return measured(vae.compile_decoder(spec, names), store, inputs, given)


def diffusers(given: argparse.Namespace) -> dict[str, Any]:
    """The same decoder by diffusers, in float32."""
    import torch
    from diffusers import AutoencoderKL

    torch.set_num_threads(given.threads or executors.default_threads())
    spec = autoencoder(given.small)
    count = len(spec.widths)
    model = AutoencoderKL(
        block_out_channels=spec.widths, layers_per_block=spec.blocks, latent_channels=spec.latent,
        norm_num_groups=spec.groups, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
    ).eval()  # fmt: skip
    del model.encoder
    side = given.size // 2 ** (count - 1)
    latents = torch.randn(1, spec.latent, side, side)

    def run() -> None:
        with torch.inference_mode():
            model.decode(latents)

    _, most, before = peak(run)
    told = {"peak_mib": round(most), "run_mib": round(most - before)}
    return told | {"seconds": round(seconds(run, given.rounds), 4)}


def prompt(given: argparse.Namespace) -> dict[str, Any]:
    spec = t5(given.small)
    store, names = weights(spec, "encoder.", given.t5_format)
    inputs: Given = dict(encoder.inputs(spec, [7] * given.tokens, causal=False))
    return measured(encoder.compile(spec, names), store, inputs, given)


ACTS = {
    "step": step, "offloaded": offloaded, "decode": decode, "diffusers": diffusers, "t5": prompt,
}  # fmt: skip


def apart(part: str) -> dict[str, Any]:
    """Run a part in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tell(part: str) -> None:
    """A line of JSON; a decoder's beside diffusers'."""
    told = {"part": part} | apart(part)
    if part == "decode":
        theirs = apart("diffusers")
        told["diffusers"] = theirs
        told |= {
            "speed_ratio": round(theirs["seconds"] / told["seconds"], 2),
            "memory_ratio": round(told["run_mib"] / max(theirs["run_mib"], 1), 2),
        }
    print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=[], metavar=f"{{{','.join(PARTS)}}}")
    parser.add_argument("--size", type=int, help="pixels of each edge; by default 512")
    parser.add_argument("--format", default="q4_k", choices=FORMATS, help="of the transformer")
    parser.add_argument("--t5-format", default="q8_0", choices=FORMATS)
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt")
    parser.add_argument("--double", type=int, help="blocks of the transformer; by default 19")
    parser.add_argument("--single", type=int, help="and after those; by default 38")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--small", action="store_true", help="all in miniature")
    parser.add_argument("--alone", choices=ACTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.size = given.size or (64 if given.small else 512)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if given.alone:
        print(json.dumps(ACTS[given.alone](given)))
        return
    for part in given.parts or PARTS:
        tell(part)


if __name__ == "__main__":
    main()
