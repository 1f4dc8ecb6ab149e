"""How long running streams wait for their next token when something large arrives at the server.

    python bench/stalls.py --arrival prompt --repeat 3

Eight streams run; then comes a prompt of 6,000 tokens, a JSON schema of 100 kB, or a body that is
made to be slow to read.
Gaps between the tokens of a stream are reported in ms, before it came and from then on until it is
answered, with the prompt's time to its first token. The model is the default one, on a real server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATH = "/v1/chat/completions"
CALM_S = 1.5
WORDS = "The tide is high when the moon is near, because the water follows it around the earth. "


def _bytes(body: Any) -> bytes:
    return json.dumps(body).encode()


def _many(item: bytes, count: int) -> bytes:
    return b"[" + (item + b",") * count + item + b"]"


MESSAGE, PART = b'{"role":"","content":""}', b'{"type":"text","text":""}'
CHAT, PROMPT = b'{"messages":%s,"max_tokens":1}', b'{"prompt":%s,"max_tokens":1}'


def schema(properties: int = 900) -> dict[str, Any]:
    """A JSON schema of about 100 kB that no server has seen."""
    names = [f"field_{secrets.token_hex(4)}" for _ in range(properties)]
    described = {"description": "What is in this field, as people would say it to each other."}
    kinds = ({"type": "string", "maxLength": 40}, {"type": "integer"}, {"enum": ["a", "b", "c"]})
    fields = {name: kinds[i % 3] | described for i, name in enumerate(names)}
    return {"type": "object", "properties": fields, "required": names[:9]}


ARRIVALS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: PROMPT % b'"x"',
    "prompt": lambda: _bytes({"prompt": [1000 + 7 * i for i in range(6000)], "max_tokens": 1}),
    "schema": lambda: _bytes(
        {
            "messages": "x",
            "max_tokens": 1,
            "seed": 1,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema()},
            },
        }
    ),
    # Too long, too many, or as many as may be.
    "characters": lambda: CHAT % (b'"' + b"x" * (2**24 - 100) + b'"'),
    "words": lambda: _bytes({"messages": (WORDS * 6000)[:520_000]}),
    "messages": lambda: CHAT % _many(MESSAGE, 600_000),
    "some messages": lambda: CHAT % _many(MESSAGE, 38_000),
    "some parts": lambda: CHAT % (b'[{"role":"user","content":' + _many(PART, 38_000) + b"}]"),
    "some ids": lambda: PROMPT % _many(b"123456789012345", 990_000),
    "some fields": lambda: b"{%s}" % b",".join(b'"%d":1' % i for i in range(110_000)),
}


class Stream:
    """One answer, and when its tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    async def run(self, port: int, number: int) -> None:
        """Read until cancelled."""
        body = {
            "messages": f"Tell story {number}.", "max_tokens": 2000, "stream": True,
            "ignore_eos": True, "temperature": 1, "seed": number,
        }  # fmt: skip
        reader, writer = await ask(port, PATH, _bytes(body))
        try:
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    self.times.append(time.perf_counter())
        finally:
            writer.close()

    def gaps(self, start_s: float, end_s: float) -> list[float]:
        """Pauses that end after `start_s` and begin before `end_s`."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [b - a for a, b in pairs if b > start_s and a < end_s]


async def ask(
    port: int, path: str, body: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


async def measure(port: int, arrival: str, streams: int) -> dict[str, Any]:
    """One arrival among running streams."""
    body = ARRIVALS[arrival]()
    running = [Stream() for _ in range(streams)]
    tasks = [asyncio.create_task(s.run(port, i)) for i, s in enumerate(running)]
    while not all(len(stream.times) > 3 for stream in running):
        await asyncio.sleep(0.01)
    await asyncio.sleep(CALM_S)
    came_s = time.perf_counter()
    path = "/v1/completions" if b'"prompt"' in body[:20] else PATH
    reader, writer = await ask(port, path, body)
    answer = await reader.read()
    answered_s = time.perf_counter()
    writer.close()
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "arrival": arrival,
        "body_bytes": len(body),
        "status": int(answer.split(b" ", 2)[1]),
        "answered_ms": round(1000 * (answered_s - came_s)),
        "calm": summary(running, came_s - CALM_S, came_s),
        "disturbed": summary(running, came_s, answered_s),
    }


def summary(running: list[Stream], start_s: float, end_s: float) -> dict[str, float]:
    """Percentiles of gaps in ms; `min_tokens` is what the slowest stream got meanwhile."""
    gaps = sorted(gap for stream in running for gap in stream.gaps(start_s, end_s))
    found = {f"p{p}": round(1000 * gaps[(len(gaps) - 1) * p // 100], 4) for p in (50, 99, 100)}
    return found | {"min_tokens": min(len(s.gaps(start_s, end_s)) for s in running)}


@contextmanager
def serving(*options: str) -> Iterator[int]:
    """The port of a server of the default model, in a process of its own."""
    command = [sys.executable, "-m", "squall", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            match = None
            while match is None:
                match = re.search(r"http://127\.0\.0\.1:(\d+)", server.stderr.readline())
            # Its log must not fill the pipe.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield int(match[1])
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arrival", choices=ARRIVALS, nargs="+", default=["prompt"])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    with serving("--context", "8192", "--kv-tokens", "32768") as port:
        for arrival in arguments.arrival:
            for _ in range(arguments.repeat):
                found = asyncio.run(measure(port, arrival, arguments.streams))
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
