"""examples/server/ray_serve.py: two replicas behind one endpoint, of which one is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from servers import in_thread, until

from squall import Model

EXAMPLE = Path(__file__).parents[2] / "examples/server/ray_serve.py"
START_S = 120.0
REQUESTS = 200
TOPICS = ("the sea", "old ships", "bread", "winter", "bees", "clocks", "rivers", "glass")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(find_spec("ray") is None, reason="make ray: Ray, in its own environment"),
]


@dataclass(frozen=True)
class Found:
    """An answer, and who gave it."""

    text: str
    cached: int
    replica: str


def question(number: int) -> dict[str, Any]:
    """One of many chats, of which every eighth begins alike; every fourth is drawn by a seed."""
    topic = TOPICS[number % len(TOPICS)]
    system = f"You know all about {topic}. Whatever you are asked, you answer briefly, and {topic} "
    system += "is what every answer comes to in the end, as nothing else is of any interest to you."
    asked = f"Question {number}: what comes after {number}, and why?"
    return {
        "model": "default",
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": asked}],
        "max_tokens": 16,
        **({"temperature": 0} if number % 4 else {"temperature": 0.9, "seed": number}),
    }


def ask(client: openai.OpenAI, number: int) -> Found:
    """The answer, every third time by a stream."""
    body = question(number)
    if number % 3:
        raw = client.chat.completions.with_raw_response.create(**body)
        answer = raw.parse()
        text, usage = answer.choices[0].message.content, answer.usage
    else:
        options = {"include_usage": True}
        raw = client.chat.completions.with_raw_response.create(
            **body, stream=True, stream_options=options
        )
        chunks = list(raw.parse())
        assert len({chunk.id for chunk in chunks}) == 1
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        usage = chunks[-1].usage
    assert usage.completion_tokens == 16 or text
    cached = usage.prompt_tokens_details.cached_tokens
    return Found(text, cached, raw.headers.get("x-squall-replica", ""))


def client_of(url: str) -> openai.OpenAI:
    """One that never asks twice by itself."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def stream(client: openai.OpenAI, number: int) -> Iterator[str]:
    """A longer answer, piece by piece."""
    body = question(number) | {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
    for chunk in client.chat.completions.create(**body, stream=True):
        yield chunk.choices[0].delta.content or ""


@pytest.fixture(scope="module")
def one_squall() -> Iterator[openai.OpenAI]:
    """A client of one server, which is not Ray's."""
    with Model.open() as model, in_thread(model) as running:
        yield client_of(running.url)


@pytest.fixture(scope="module")
def expected(one_squall: openai.OpenAI) -> list[str]:
    """What one Squall answers."""
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda number: ask(one_squall, number), range(REQUESTS))
        return [answer.text for answer in found]


@contextmanager
def started(log: Path) -> Iterator[tuple[str, int]]:
    """The example on a free port: its URL and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLE), "--replicas", "2", "--port", str(port)]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/v1/models", timeout=30).status_code == 200
        except httpx.HTTPError:
            time.sleep(0.5)
            return False

    try:
        until(ready, START_S)
        until(lambda: len(replicas(process.pid)) == 2, START_S)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    with started(tmp_path_factory.mktemp("ray") / "log") as found:
        yield found


def replicas(ancestor: int) -> set[int]:
    """Processes of replicas that a process has started, directly or not."""
    parents, named = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, title = (folder / "stat").read_text(), (folder / "cmdline").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
        if title.startswith("ray::ServeReplica:squall:Replica"):
            named.add(int(folder.name))

    def is_below(pid: int) -> bool:
        return pid == ancestor or (pid in parents and is_below(parents[pid]))

    return {pid for pid in named if is_below(pid)}


@pytest.mark.slow("Ray takes ten seconds to start")
def test_prompts_that_begin_alike_share_a_cache(
    cluster: tuple[str, int], expected: list[str]
) -> None:
    client = client_of(cluster[0])
    found: dict[str, list[Found]] = defaultdict(list)
    for number in range(4 * len(TOPICS)):
        answer = ask(client, number)
        assert answer.text == expected[number]
        found[TOPICS[number % len(TOPICS)]].append(answer)
    homes = {topic: {answer.replica for answer in answers} for topic, answers in found.items()}
    assert all(len(names) == 1 for names in homes.values()), homes
    assert len(set.union(*homes.values())) == 2
    for first, *others in found.values():
        assert first.cached < 32
        assert all(answer.cached >= 32 for answer in others)


@pytest.mark.slow("200 requests, and a replica that starts again")
def test_no_request_fails_when_a_replica_is_killed(
    cluster: tuple[str, int], expected: list[str]
) -> None:
    url, pid = cluster
    client, lock = client_of(url), threading.Lock()
    before, left = replicas(pid), [REQUESTS // 3]
    victim = min(before)

    def one(number: int) -> Found:
        with lock:
            left[0] -= 1
            if left[0] == 0:
                os.kill(victim, signal.SIGKILL)
        return ask(client, number)

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(one, range(REQUESTS)))
    assert [answer.text for answer in found] == expected
    assert len({answer.replica for answer in found}) >= 2
    until(lambda: len(replicas(pid)) == 2, START_S)
    assert replicas(pid) - before


@pytest.mark.slow("long answers, and a replica that starts again")
def test_streams_go_on_when_their_replica_is_killed(
    cluster: tuple[str, int], one_squall: openai.OpenAI
) -> None:
    url, pid = cluster
    numbers = range(len(TOPICS))
    streams = [stream(client_of(url), number) for number in numbers]
    begun = ["".join(next(each) for _ in range(10)) for each in streams]
    assert all(begun)
    os.kill(max(replicas(pid)), signal.SIGKILL)
    found = [start + "".join(rest) for start, rest in zip(begun, streams, strict=True)]
    assert found == ["".join(stream(one_squall, number)) for number in numbers]
    until(lambda: len(replicas(pid)) == 2, START_S)


def test_errors_are_those_of_the_server(cluster: tuple[str, int]) -> None:
    client = client_of(cluster[0])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**question(0) | {"temperature": -1})
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
    assert [model.object for model in client.models.list()] == ["model"]
    done = client.completions.create(model="default", prompt="The sea is", max_tokens=4)
    assert done.usage is not None
    assert done.usage.completion_tokens == 4
