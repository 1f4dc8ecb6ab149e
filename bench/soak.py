"""A server under all kinds of traffic for a while: no 5xx, no leak, the engine's books in order.

    python bench/soak.py --minutes 10

Clients stream, wait, leave in the middle, and send rubbish. The report is JSON; the exit status is
1 if something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from squall import EngineConfig, Model
from squall.server.options import ServerOptions
from squall.server.run import listen, make_server
from squall.server.service import Service

sys.path.append(str(Path(__file__).parents[1] / "tests" / "engine"))
from invariants import check_scheduler

CLIENTS = 64
PATH = "/v1/chat/completions"
RUBBISH = (b"", b"{", b"[]", b'{"messages": 5}', b'{"messages": "x", "n": 1000000}', b"\xff" * 100)
WORDS = "red green blue tide moon water earth stone river high near far".split()  # noqa: SIM905
ALLOWED_BYTES = 1000  # a request, over a long time
ALLOWED_DRIFT = 0.05
LONG = 5  # minutes, from which on memory and rates are judged
THINKING_S = 0.2  # between the requests of a client, at most


def anonymous_bytes() -> int:
    """Memory of this process that is no file's, in RAM or swapped."""
    text = Path("/proc/self/status").read_text()
    return 1024 * sum(map(int, re.findall(r"(?:RssAnon|VmSwap):\s+(\d+)", text)))


async def one(port: int, chosen: random.Random, seen: Counter[str]) -> None:
    """One request of some kind."""
    kind = chosen.choice(("whole", "stream", "leave", "leave", "rubbish", "completion"))
    text = " ".join(chosen.choices(WORDS, k=chosen.randint(1, 120)))
    body: dict[str, Any] = {
        "messages": text, "max_tokens": chosen.randint(1, 24), "stream": kind != "whole",
        "temperature": chosen.choice((0, 1)), "logprobs": chosen.random() < 0.3,
        "n": chosen.choice((1, 1, 1, 2)),
    }  # fmt: skip
    path = PATH
    if kind == "completion":
        path, body = (
            "/v1/completions",
            {"prompt": [text, text[::-1]], "max_tokens": 4, "echo": True},
        )
    data = chosen.choice(RUBBISH) if kind == "rubbish" else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if kind == "leave":
            await asyncio.wait_for(reader.read(1), chosen.random())
            return
        answer = await asyncio.wait_for(reader.read(), 60)
        seen[answer.split(b" ", 2)[1].decode()] += 1
        seen["broken"] += b'"error"' in answer and b" 200 " in answer[:20]
    except asyncio.TimeoutError:
        seen["left" if kind == "leave" else "hung"] += 1
    except OSError:
        seen["reset"] += 1
    finally:
        writer.close()


async def client(port: int, number: int, end_s: float, seen: Counter[str]) -> None:
    """Requests until it is time."""
    chosen = random.Random(number)
    while time.monotonic() < end_s:
        seen["requests"] += 1
        await one(port, chosen, seen)
        await asyncio.sleep(THINKING_S * chosen.random())


async def traffic(port: int, seconds: float, seen: Counter[str]) -> None:
    """All clients at a time."""
    end_s = time.monotonic() + seconds
    await asyncio.gather(*(client(port, i, end_s, seen) for i in range(CLIENTS)))


async def answers_s(port: int) -> float:
    """Seconds for the same eight answers, when nobody else asks."""
    body = {"messages": "Tell a story.", "max_tokens": 32, "ignore_eos": True, "temperature": 0}
    data = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"

    async def answer() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()

    start_s = time.perf_counter()
    await asyncio.gather(*(answer() for _ in range(8)))
    return time.perf_counter() - start_s


def slowness(port: int, idle_port: int, rounds: int) -> float:
    """How long answers take here, as a ratio to a server that has nothing else to do.

    The machine's own rate drifts by more than what is looked for; the two are asked in turn.
    """
    return median(
        asyncio.run(answers_s(port)) / asyncio.run(answers_s(idle_port)) for _ in range(rounds)
    )


@contextmanager
def served() -> Iterator[tuple[Model, Service, int]]:
    """A server in this process: its model, its service and its port."""
    config = EngineConfig(max_seqs=8, max_queue=40, prefix_cache_n=2)
    with (
        Model.open(context=1024, kv_tokens=2048, engine=config) as model,
        open("/dev/null", "w") as log,
    ):
        listener, started = listen("127.0.0.1", 0), threading.Event()
        server = make_server(model, ServerOptions(), started.set)
        server.service.log._stream = log
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        started.wait()
        try:
            yield model, server.service, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def _serve_idle(pipe: Connection) -> None:
    with served() as (_, _, port):
        pipe.send(port)
        pipe.recv()


@contextmanager
def idle_server() -> Iterator[int]:
    """The port of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_idle, args=(theirs,), daemon=True)
    process.start()
    yield ours.recv()
    ours.send(None)
    process.join()


def soak(seconds: float) -> dict[str, Any]:
    """What came of it; `problems` is empty if all was well."""
    rounds = 15 if seconds >= LONG * 60 else 1
    with idle_server() as idle_port, served() as (model, service, port):
        seen = Counter[str]()
        # What is allocated once is not a leak.
        asyncio.run(traffic(port, seconds / 3, Counter()))
        slowness_before = slowness(port, idle_port, rounds)
        before = anonymous_bytes()
        asyncio.run(traffic(port, seconds * 2 / 3, seen))
        grown = anonymous_bytes() - before
        problems = _leftovers(model, service)
        drift = slowness(port, idle_port, rounds) / slowness_before - 1
    problems += [f"{seen[name]} {name}" for name in seen if name[0] == "5" or name in BAD]
    each = grown / max(seen["requests"], 1)
    return {
        **seen, "grown_bytes": grown, "bytes_a_request": round(each), "drift": round(drift, 3),
        "problems": problems,
    }  # fmt: skip


BAD = ("broken", "hung", "reset")


def _leftovers(model: Model, service: Service) -> list[str]:
    """What is still there once everybody has left."""
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        stats = model.engine.stats()
        if stats.running == stats.waiting == stats.blocks_used == service.active == 0:
            break
        time.sleep(0.05)
    else:
        return [f"not idle in the end: {stats}, {service.active} active"]
    check_scheduler(model.engine._scheduler)
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    report = soak(60 * minutes)
    report["problems"] = [p for p in report["problems"] if not p.startswith("0 ")]
    if minutes >= LONG and report["bytes_a_request"] > ALLOWED_BYTES:
        report["problems"].append(f"memory grows by more than {ALLOWED_BYTES} bytes a request")
    if minutes >= LONG and report["drift"] > ALLOWED_DRIFT:
        report["problems"].append(
            f"answers take {report['drift']:.0%} longer than in the beginning"
        )
    print(json.dumps(report))
    sys.exit(bool(report["problems"]))


if __name__ == "__main__":
    main()
