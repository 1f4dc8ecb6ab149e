"""What adapters cost: tokens a second with them and without, loading one, and who waits meanwhile.

    python bench/adapters.py model.gguf --rounds 5

Adapters are random, of attention and MLP, for a model with Llama's linears. Rounds alternate. `16
requests on 8 adapters` and `1 request` have the ratio to the same requests without adapters;
`loading` is from files that the system has in memory, and the longest gap between two tokens of
running requests, in ms, before and while adapters are loaded one after the other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from squall import Model
from squall.engine.generation import Generation
from squall.engine.request import Piece, Request
from squall.engine.sampling import Sampling
from squall.spec import Decoder, Mlp

PROMPT = list(range(10, 42))
CALM_S = 1.0


def linears(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """Name, rows and columns of each linear of attention and MLP."""
    found = {}
    for number, layer in enumerate(decoder.layers):
        a, mlp, hidden = layer.attention, layer.feed_forward, decoder.hidden
        if not isinstance(mlp, Mlp) or not mlp.gated:
            raise SystemExit("the model has no gated MLPs; give one such as Llama's")
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        sizes = {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (mlp.width, hidden), "mlp.up_proj": (mlp.width, hidden),
            "mlp.down_proj": (hidden, mlp.width),
        }  # fmt: skip
        found |= {f"model.layers.{number}.{name}": size for name, size in sizes.items()}
    return found


def write(folder: Path, decoder: Decoder, rank: int, seed: int, dtype: str) -> Path:
    """An adapter as PEFT saves it."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (rows, cols) in linears(decoder).items():
        for part, shape in (("A", (rank, cols)), ("B", (rows, rank))):
            values = rng.standard_normal(shape, np.float32) * np.float32(0.01)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values.astype(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({name.rpartition(".")[2] for name in linears(decoder)})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def asked(model: Model, count: int, tokens: int, names: Sequence[str]) -> list[Request]:
    """Requests that begin differently, and have the adapters one after the other."""
    found = []
    for i in range(count):
        adapters = names[i % len(names)] if names else []
        ids, sampling = [50 + i, *PROMPT], Sampling(temperature=0)
        one = model.request(ids, sampling, tokens, adapters=adapters)
        found.append(replace(one, ignore_eos=True))
    return found


def rate(model: Model, requests: Sequence[Request]) -> float:
    """Tokens a second of all of them together, prompts aside."""
    answers = [Generation(model.engine, request) for request in requests]
    for answer in answers:
        answer.read()
    return sum(answer.usage.answer_rate for answer in answers)


def compare(model: Model, count: int, tokens: int, names: Sequence[str], rounds: int) -> None:
    """The same requests with adapters and without."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for having in (False, True):
            found = rate(model, asked(model, count, tokens, names if having else ()))
            if number:  # the first warms up
                rates[having].append(found)
    ratios = [after / before for before, after in zip(rates[False], rates[True], strict=True)]
    told = {
        "case": f"{count} requests on {len(names)} adapters",
        "without": round(median(rates[False]), 1),
        "with": round(median(rates[True]), 1),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median": round(median(ratios), 3),
    }
    print(json.dumps(told), flush=True)


def load(model: Model, count: int, names: Sequence[str], paths: Sequence[Path]) -> None:
    """The time of each load among running requests, and the gaps in their tokens."""
    times: list[list[float]] = [[] for _ in range(count)]

    def listener(number: int) -> Any:
        def sink(piece: Piece) -> None:
            times[number] += [time.perf_counter()] * len(piece.ids)

        return sink

    requests = asked(model, count, model.context - len(PROMPT) - 1, names)
    replies = [model.engine.submit(one, listener(i)) for i, one in enumerate(requests)]
    while not all(len(each) > 3 for each in times):
        time.sleep(0.01)
    begun = time.perf_counter()
    # A small model would be done before anything is loaded.
    while time.perf_counter() - begun < CALM_S and max(map(len, times)) < model.context // 4:
        time.sleep(0.005)
    loads: list[float] = []

    def work() -> None:
        for path in paths:
            start = time.perf_counter()
            info = model.adapters.load("new", path)
            loads.append(time.perf_counter() - start)
        told["adapter_mib"] = round(info.nbytes / 2**20, 1)

    told: dict[str, object] = {"case": f"loading among {count} requests"}
    calm = time.perf_counter()
    thread = Thread(target=work)
    thread.start()
    thread.join()
    end = time.perf_counter()
    for reply in replies:
        reply.cancel()

    def longest(start: float, stop: float) -> float:
        pairs = [pair for each in times for pair in pairwise(each)]
        return round(1000 * max(b - a for a, b in pairs if b > start and a < stop), 2)

    told |= {
        "load_ms": [round(1000 * each, 1) for each in loads],
        "longest_gap_ms": longest(calm, end),
        "calm_gap_ms": longest(begun, calm),
    }
    print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="by default the default model")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=5)
    given = parser.parse_args()
    with Model.open(given.model, context=2048) as model, tempfile.TemporaryDirectory() as folder:
        names = [f"adapter {i}" for i in range(given.adapters)]
        for seed, name in enumerate([*names, "new"]):
            path = write(Path(folder, name), model.spec, given.rank, seed, given.dtype)
            model.adapters.load(name, path)
        compare(model, given.requests, given.tokens, names, given.rounds)
        compare(model, 1, given.tokens, names[:1], given.rounds)
        load(model, given.requests, names, [path] * given.loads)


if __name__ == "__main__":
    main()
