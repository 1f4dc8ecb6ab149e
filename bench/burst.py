"""A burst of four times what the server has room for: who is refused, and how soon.

    python bench/burst.py --repeat 5

16 answers may run and 48 wait; 256 requests come at once. Told are the statuses, the ms until a
refused one has its 429, whether each of those says when to come again, and whether the answers are
byte for byte those that the same requests get alone. The model is the default one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from typing import Any, NamedTuple

from stalls import PATH, ask, serving

RUNNING, WAITING, FACTOR = 16, 48, 4


class Answer(NamedTuple):
    """What came back: when the header came, in s, and the words of the answer."""

    status: int
    retry_after: bool
    header_s: float
    text: str


async def one(port: int, number: int) -> Answer:
    """A short answer, always the same for a number."""
    body = {
        "messages": f"Tell story {number}.", "max_tokens": 24, "ignore_eos": True, "stream": True,
        "temperature": 1, "seed": number,
    }  # fmt: skip
    start_s = time.perf_counter()
    reader, writer = await ask(port, PATH, json.dumps(body).encode())
    header = await reader.readuntil(b"\r\n\r\n")
    header_s = time.perf_counter() - start_s
    lines = (await reader.read()).split(b"\n")
    writer.close()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    text = "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
    )
    return Answer(int(header.split()[1]), b"retry-after:" in header.lower(), header_s, text)


async def burst(port: int, alone: dict[int, str]) -> dict[str, Any]:
    """All at once. `alone` has the answers so far, and gets those that are missing."""
    count = FACTOR * (RUNNING + WAITING)
    found = await asyncio.gather(*(one(port, number) for number in range(count)))
    refused = sorted(answer.header_s for answer in found if answer.status == 429)
    answered = [number for number, answer in enumerate(found) if answer.status == 200]
    for number in answered:
        if number not in alone:
            alone[number] = (await one(port, number)).text
    return {
        "statuses": dict(Counter(answer.status for answer in found)),
        "refused_ms": {
            f"p{p}": round(1000 * refused[(len(refused) - 1) * p // 100], 1) for p in (50, 99, 100)
        },
        "all_say_when": all(answer.retry_after for answer in found if answer.status == 429),
        "same_answers": all(found[number].text == alone[number] for number in answered),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeat", type=int, default=1)
    repeat = parser.parse_args().repeat
    alone: dict[int, str] = {}
    with serving("--max-seqs", str(RUNNING), "--max-queue", str(WAITING)) as port:
        for _ in range(repeat):
            print(json.dumps(asyncio.run(burst(port, alone))), flush=True)


if __name__ == "__main__":
    main()
