"""Squall's side of `peers.py`: the same argument and result as `llama_worker.py`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from squall import Model, _native
from squall.assembly import prepare
from squall.measure import Bench, Workload
from squall.opening import Opening


def memory() -> dict[str, int]:
    """Resident bytes of this process: of its own, and of files."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def main() -> None:
    """Load, measure, print."""
    job = json.loads(sys.argv[1])
    plans = [Workload(prompt, answer, batch=batch) for prompt, answer, batch in job["plans"]]
    start_s = time.perf_counter()
    with Model.open(job["model"], context=plans[0].context, threads=job["threads"]) as model:
        model.logits([1000 % model.spec.vocab])
        load_s = time.perf_counter() - start_s
    del model
    result: dict[str, Any] = {
        "load_s": load_s,
        "rates": [],
        "bandwidth": _native.read_bandwidth(job["threads"]),
        "system": _native.default_isa(),
    }
    for plan in plans:
        bench = Bench(prepare(Opening(job["model"])), plan, threads=job["threads"])
        rates = bench.rates(1, warm_up=plan.prompt <= job["warm_up"])
        result["rates"].append([rate.tokens_per_second[0] for rate in rates])
        result.setdefault("memory", memory())
        del bench
    print(json.dumps(result))


if __name__ == "__main__":
    main()
