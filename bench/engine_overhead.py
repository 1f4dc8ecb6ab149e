"""What a decode step spends beside the executor: sampling, and scheduling, text and handover."""

from __future__ import annotations

import argparse
import statistics
import time

from squall import Model
from squall.engine.engine import EngineConfig
from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import Sampling

SAMPLINGS = {
    "greedy": Sampling(temperature=0, seed=0),
    "top-p": Sampling(temperature=0.7, top_p=0.95, seed=1),
}


def measure(model: Model, requests: int, tokens: int, sampling: Sampling) -> tuple[float, ...]:
    """Milliseconds of a step, and in it of the executor, of sampling, and of all else."""
    engine = model.engine
    generations = [
        Generation(
            engine,
            Request(ids=[i + 1], sampling=sampling, max_tokens=tokens, ignore_eos=True),
        )
        for i in range(requests)
    ]
    for generation in generations:
        next(generation)
    before, start_s = engine.stats().counts, time.perf_counter()
    for generation in generations:
        generation.read()
    wall_s, after = time.perf_counter() - start_s, engine.stats().counts
    executor_s = after.executor_s - before.executor_s
    sampling_s = after.sampling_s - before.sampling_s
    parts = (wall_s, executor_s, sampling_s, wall_s - executor_s - sampling_s)
    return tuple(1e3 * seconds / (after.steps - before.steps) for seconds in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-f", "--file", help="a GGUF file; by default the default model")
    parser.add_argument("-g", "--tokens", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    config = EngineConfig(max_seqs=16)
    with Model.open(arguments.file, threads=arguments.threads, engine=config) as model:
        for name, sampling in SAMPLINGS.items():
            for requests in (1, 16):
                found = [
                    measure(model, requests, arguments.tokens, sampling)
                    for _ in range(arguments.repetitions + 1)
                ][1:]
                step, executor, drawing, rest = map(statistics.median, zip(*found, strict=True))
                print(
                    f"{name:7} batch {requests:2}: {step:6.2f} ms a step; executor {executor:.2f}, "
                    f"sampling {drawing:.3f}, all else {rest:.3f} ({100 * rest / step:.1f} %)"
                )


if __name__ == "__main__":
    main()
