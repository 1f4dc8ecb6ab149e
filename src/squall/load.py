"""Many requests at a time, to this process's engine or to a server, and how long they take."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

import httpx

from squall.engine.generation import Generation
from squall.engine.request import Request
from squall.engine.sampling import Sampling
from squall.errors import InvalidRequest, TemplateError
from squall.model import Model

# Common words, nearly always one token each.
WORDS = (  # noqa: SIM905
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night"
).split()
PERCENTS = (50, 95, 99)
WAIT_S = 600.0
# Tokens that a chat template may add to a message.
TEMPLATE_ROOM = 128


@dataclass(slots=True)
class Trace:
    """One request: seconds to its first text and between the others, and tokens."""

    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    answer_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests at a time, one after another in each place; the prompts all differ.

    prompt_tokens: words, nearly always one token each; a chat template adds its own.
    """

    concurrency: int
    rounds: int
    prompt_tokens: int
    answer_tokens: int


Ask = Callable[[Load, int], Awaitable[Trace]]


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a load. Percentiles are of all requests, or of all gaps, in seconds."""

    concurrency: int
    requests: int
    errors: int
    first_error: str | None
    elapsed_s: float
    prompt_tokens: int
    answer_tokens: int
    answer_tokens_per_second: float
    first_s: dict[str, float]
    gap_s: dict[str, float]
    guessed_tokens: int
    accepted_tokens: int


async def run(load: Load, ask: Ask) -> Report:
    async def place(number: int) -> list[Trace]:
        # Not a comprehension of tasks: the next request of a place begins when the last has ended.
        return [await ask(load, number * load.rounds + i) for i in range(load.rounds)]

    start_s = time.perf_counter()
    found = await asyncio.gather(*(place(number) for number in range(load.concurrency)))
    elapsed_s = time.perf_counter() - start_s
    traces = [trace for traces in found for trace in traces]
    good = [trace for trace in traces if trace.error is None]
    answer_tokens = sum(trace.answer_tokens for trace in good)
    return Report(
        concurrency=load.concurrency,
        requests=len(traces),
        errors=len(traces) - len(good),
        first_error=next((trace.error for trace in traces if trace.error is not None), None),
        elapsed_s=elapsed_s,
        prompt_tokens=sum(trace.prompt_tokens for trace in good),
        answer_tokens=answer_tokens,
        answer_tokens_per_second=answer_tokens / elapsed_s,
        first_s=percentiles([trace.first_s for trace in good]),
        gap_s=percentiles([gap for trace in good for gap in trace.gaps_s]),
        guessed_tokens=sum(trace.guessed_tokens for trace in good),
        accepted_tokens=sum(trace.accepted_tokens for trace in good),
    )


def run_all(loads: Sequence[Load], ask: Ask) -> list[Report]:
    async def every() -> list[Report]:
        first = await ask(Load(1, 1, 1, 2), 0)  # what only the first request pays for
        if first.error is not None:
            raise InvalidRequest(f"the first request failed: {first.error}; is the server there?")
        return [await run(load, ask) for load in loads]

    return asyncio.run(every())


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99, each a value that occurred; none of nothing."""
    ordered = sorted(values)
    at = {percent: max(-(-len(ordered) * percent // 100) - 1, 0) for percent in PERCENTS}
    return {f"p{percent}": ordered[i] for percent, i in at.items()} if ordered else {}


def _messages(load: Load, number: int) -> list[dict[str, str]]:
    """Words that begin like no other request's."""
    chosen = random.Random(number + 1_000_003 * load.concurrency)
    return [{"role": "user", "content": " ".join(chosen.choices(WORDS, k=load.prompt_tokens))}]


def _ids(model: Model, load: Load, number: int) -> list[int]:
    """What a server would make of the messages, as far as it fits."""
    messages = _messages(load, number)
    try:
        ids = model.encode_chat(messages)
    except TemplateError:  # there is none
        ids = model.encode(messages[0]["content"])
    most = min(load.prompt_tokens + TEMPLATE_ROOM, model.context - load.answer_tokens)
    return ids[:most]


def in_process(model: Model) -> Ask:
    async def ask(load: Load, number: int) -> Trace:
        request = Request(
            ids=_ids(model, load, number),
            sampling=Sampling(temperature=0, seed=0),
            max_tokens=load.answer_tokens,
            ignore_eos=True,
        )
        trace = Trace()
        generation = Generation(model.engine, request)
        await _time(trace, generation)
        for name in ("prompt_tokens", "answer_tokens", "guessed_tokens", "accepted_tokens"):
            setattr(trace, name, getattr(generation.usage, name))
        return trace

    return ask


def over_http(url: str, *, key: str | None) -> Ask:
    """Asks a server with OpenAI's API at `url`, such as http://127.0.0.1:8080."""
    where = urlsplit(url if "://" in url else f"http://{url}")
    if where.scheme not in ("http", "https") or not where.hostname:
        raise InvalidRequest(f"{url!r} is no URL of a server; such as http://127.0.0.1:8080")
    path = where.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    target = f"{where.scheme}://{where.netloc}{path}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    verify = ssl.create_default_context() if where.scheme == "https" else False

    async def ask(load: Load, number: int) -> Trace:
        body = {
            "model": "default",
            "messages": _messages(load, number),
            "max_tokens": load.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        trace = Trace()
        # A connection for each request, and no proxy between, which would be measured too.
        client = httpx.AsyncClient(timeout=WAIT_S, verify=verify, trust_env=False, headers=headers)
        async with client:
            answer = client.stream("POST", target, json=body)
            try:
                await _time(trace, _texts(answer, trace))
            except (httpx.HTTPError, httpx.InvalidURL, LookupError, OSError, ValueError) as error:
                trace.error = f"{type(error).__name__}: {error}"
        return trace

    return ask


async def _time(trace: Trace, texts: AsyncIterator[object]) -> None:
    times_s = [time.perf_counter()]
    times_s += [time.perf_counter() async for _ in texts]
    steps_s = [now - last for last, now in pairwise(times_s)]
    trace.first_s = steps_s[0] if steps_s else 0.0
    trace.gaps_s = steps_s[1:]


async def _texts(
    answer: AbstractAsyncContextManager[httpx.Response], trace: Trace
) -> AsyncIterator[str]:
    """The texts of an event stream; tells the trace the usage. ValueError for anything else.

    A server that tells no usage is taken to send a token a text.
    """
    told = False
    async with answer as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise ValueError(f"status {response.status_code}: {text[:200]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[len("data: ") :])
            if "error" in event:
                raise ValueError(event["error"].get("message", "an error in the stream"))
            if usage := event.get("usage"):
                told = True
                trace.prompt_tokens = usage["prompt_tokens"]
                trace.answer_tokens = usage["completion_tokens"]
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    trace.answer_tokens += not told
                    yield text
