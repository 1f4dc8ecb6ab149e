"""One OpenAI endpoint of several copies of a model, on Ray Serve: `pip install squall[ray]`.

    python examples/server/ray_serve.py model.gguf --replicas 2 --port 8000

Prompts that begin alike go to one replica, where what they share is in the cache. If a replica
dies, another one says the rest of its answers, and Ray starts a new one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import Counter, OrderedDict
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    MutableMapping,
    Sequence,
)
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import RequestRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from squall import Model
from squall.server.app import create_app, service_of
from squall.server.options import ServerOptions

BLOCK = 64  # characters, about a block of KV cache
MOST_BLOCKS = 1024  # of one prompt
REPEATABLE = ("v1/chat/completions", "v1/completions")
MOST_BYTES = ServerOptions().body_bytes
TRIES = 5
REPLICA = "X-Squall-Replica"

Message = MutableMapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """A request, and a number for each beginning of its prompt: equal ones begin alike."""

    scope: dict[str, Any]
    body: bytes
    stream: bool
    beginnings: tuple[int, ...]

    @classmethod
    async def of(cls, request: Request) -> Asked | None:
        """What a client asks, so that all replicas answer the same; None if that is too much."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return None
        scope = request.scope
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        try:
            fields = json.loads(body)
        except ValueError:
            fields = None
        beginnings: list[int] = []
        streams = False
        if isinstance(fields, dict) and scope["path"].strip("/") in REPEATABLE:
            streams = fields.get("stream") is True
            if streams and fields.get("seed") is None:
                body[:] = json.dumps(fields | {"seed": random.getrandbits(32)}).encode()
                headers = [each for each in headers if each[0] != b"content-length"]
            prompt = fields.get("messages", fields.get("prompt"))
            text = json.dumps([fields.get("model"), fields.get("tools"), prompt])
            # Keys have caches of their own.
            beginnings += _beginnings(text, request.headers.get("authorization", ""))
        keep = ("type", "method", "path", "query_string", "scheme", "http_version")
        found = {key: scope[key] for key in keep} | {"headers": headers, "client": scope["client"]}
        return cls(found, bytes(body), streams, tuple(beginnings))


def _beginnings(text: str, whose: str) -> Iterator[int]:
    found = hash(whose)
    for end in range(BLOCK, min(len(text), BLOCK * MOST_BLOCKS), BLOCK):
        found = hash((found, text[end - BLOCK : end]))
        yield found


class ByBeginning(RequestRouter):  # type: ignore[misc, unused-ignore]
    """Chooses the replica that was last asked for the longest beginning of a prompt.

    Unless that is less than `share` of it, or the replica has more than `slack` requests beyond
    another one's. Then it is the one with the fewest, and of those the one with the fewest
    beginnings among all that are remembered, `most` of them.
    """

    def initialize_state(self, share: float = 0.5, slack: int = 16, most: int = 200_000) -> None:
        self._share, self._slack, self._most = share, slack, most
        self._known: OrderedDict[int, Any] = OrderedDict()
        self._sizes: Counter[Any] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        ids = {replica.replica_id: replica for replica in candidate_replicas}
        beginnings = pending_request.args[0].beginnings if pending_request else ()
        enough = beginnings[int(self._share * len(beginnings)) :]
        found = (self._known.get(each) for each in reversed(enough))
        best = next((id_ for id_ in found if id_ in ids), None)
        waiting = {id_: self.replica_queue_len_cache.get(id_) or 0 for id_ in ids}
        if best is None or waiting[best] > min(waiting.values()) + self._slack:
            best = min(ids, key=lambda id_: (waiting[id_], self._sizes[id_]))
        return [[ids[best]], candidate_replicas]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:  # noqa: ARG002
        for beginning in pending_request.args[0].beginnings:
            self._sizes[self._known.pop(beginning, None)] -= 1
            self._known[beginning] = replica_id
            self._sizes[replica_id] += 1
        while len(self._known) > self._most:
            self._sizes[self._known.popitem(last=False)[1]] -= 1


class Replica:
    """The model, and Squall's own server without its socket."""

    async def __init__(self, path: str | None, options: dict[str, Any]) -> None:  # type: ignore[misc]
        self._model = await asyncio.to_thread(Model.open, path, **options)
        self._app = create_app(self._model)
        self._running = AsyncExitStack()
        await self._running.enter_async_context(self._app.router.lifespan_context(self._app))
        self._name = serve.get_replica_context().replica_id.unique_id.encode()

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        service_of(self._app).check_ready()

    async def answer(self, asked: Asked) -> AsyncIterator[Message]:
        """What the server sends: the start of a response, then its body."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        received = [{"type": "http.request", "body": asked.body}]

        async def receive() -> Message:
            return received.pop() if received else await asyncio.Future()

        send: Callable[[Message], Awaitable[None]] = sent.put
        running = asyncio.ensure_future(self._app({**asked.scope}, receive, send))
        running.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    headers = [*message["headers"], (REPLICA.lower().encode(), self._name)]
                    message = {**message, "headers": headers}
                yield message
            await running
        finally:
            running.cancel()


class Told:
    """What a client has of a stream, when another replica tells it from the beginning.

    Both say the same event by event, as Squall's answers depend on request and seed alone.
    """

    def __init__(self) -> None:
        self._told: Counter[int | None] = Counter()
        self._seen: Counter[int | None] = Counter()

    def again(self) -> None:
        """From the beginning."""
        self._seen.clear()

    def is_new(self, event: bytes) -> bool:
        """Whether the client does not have it. Answers of one request mix in any order."""
        if not event.startswith(b"data: {"):
            return True  # a comment, or the end
        choices = json.loads(event[6:]).get("choices")
        index = choices[0]["index"] if choices else None
        self._seen[index] += 1
        new = self._seen[index] > self._told[index]
        self._told[index] += new
        return new


class Front:
    """Takes requests, and asks again where a replica dies."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """The response of a replica."""
        asked = await Asked.of(request)
        if asked is None:
            return Response(f"a body may have {MOST_BYTES} bytes", 413)
        parts = self._parts(asked)
        start: Message = await anext(parts)
        bodies = (part["body"] async for part in parts)
        if "whole" in start:
            await parts.aclose()
            response = Response(start["whole"], start["status"])
        else:
            response = StreamingResponse(bodies, start["status"])
        # Serve tells the request's id itself.
        response.raw_headers = [each for each in start["headers"] if each[0] != b"x-request-id"]
        return response

    async def _parts(self, asked: Asked) -> AsyncGenerator[Message, None]:
        told, started = Told(), False
        for left in reversed(range(TRIES)):
            told.again()
            answer = self._replicas.answer.remote(asked)
            try:
                async for message in _whole_or_stream(answer):
                    is_start = message["type"] == "http.response.start"
                    if not started if is_start else told.is_new(message["body"]):
                        started = True
                        yield message
                return
            except (RayActorError, RayServeException):
                if not left or (started and not asked.stream):
                    raise
                await asyncio.sleep(0.1)
            finally:
                answer.cancel()


async def _whole_or_stream(answer: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """The same messages; what is no stream of events becomes one, once it is complete."""
    start = await anext(answer)
    if any(value.startswith(b"text/event-stream") for _, value in start["headers"]):
        yield start
        async for message in answer:
            yield message
    else:
        yield {**start, "whole": b"".join([message.get("body", b"") async for message in answer])}


def application(path: str | None, replicas: int, gpus: float = 0, **options: Any) -> Any:
    """The deployments, for `serve.run`. options: of `Model.open`."""
    router = RequestRouterConfig(request_router_class=ByBeginning)
    resources = {"num_cpus": options.get("threads") or 1, "num_gpus": gpus}
    deployed = serve.deployment(
        num_replicas=replicas, request_router_config=router, max_ongoing_requests=256,
        ray_actor_options=resources, health_check_period_s=5, health_check_timeout_s=30,
    )(Replica)  # fmt: skip
    behind = deployed.bind(path, options)
    front = serve.deployment(Front, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    return front.bind(behind)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="a file, a folder or a name of the hub")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="of each replica")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica; 0: CPU only")
    args = parser.parse_args(arguments)
    serve.start(http_options=HTTPOptions(host=args.host, port=args.port))
    device = "cuda" if args.gpus else "cpu"
    built = application(args.model, args.replicas, args.gpus, threads=args.threads, device=device)
    serve.run(built, name="squall", blocking=True)


if __name__ == "__main__":
    main()
