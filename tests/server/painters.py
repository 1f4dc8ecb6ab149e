"""A model that paints one colour, and servers of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from servers import WAIT_S

from squall import ImageModel, Model, Picture, PictureRequest
from squall.errors import InvalidRequest
from squall.server.options import ServerOptions
from squall.server.run import Server, listen, make_server

GENERATIONS = "/v1/images/generations"


@dataclass
class Brush:
    """A pipeline that paints one colour, which the seed tells, and waits where it is told to."""

    steps: int = 4
    guidance: float | None = 4.0
    max_prompt: int = 32
    formats: tuple[()] = ()
    asked: list[PictureRequest] = field(default_factory=list)
    done: int = 0
    go: threading.Event = field(default_factory=threading.Event)

    def check(self, request: PictureRequest) -> None:
        if len(request.prompt.split()) > self.max_prompt:
            raise InvalidRequest("prompt has 33 tokens; at most 32 are read")

    def paint(self, request: PictureRequest, on_step: Any) -> Picture:
        self.asked.append(request)
        steps = request.steps or self.steps
        for step in range(-1, steps + 1):
            on_step(step, steps)
            self.done = step
            while request.prompt.startswith("slow") and step and not self.go.wait(0.02):
                on_step(step, steps)
        if "broken" in request.prompt:
            raise RuntimeError("a secret path")
        assert request.seed is not None
        pixels = np.full((request.height, request.width, 3), request.seed % 256, np.uint8)
        if request.image is not None:
            pixels[:] = request.image[0, 0]
        notes = ("CLIP read 77 tokens of 90",) if request.prompt == "long" else ()
        return Picture(pixels, request.seed, steps, notes)

    def close(self) -> None:
        self.go.set()


@dataclass
class Running:
    http: httpx.Client
    brush: Brush
    model: ImageModel
    server: Server

    @property
    def url(self) -> str:
        return str(self.http.base_url)

    def post(self, path: str = GENERATIONS, **body: Any) -> httpx.Response:
        return self.http.post(path, json={"prompt": "a cat"} | body)


@contextmanager
def serving(text: Model | None = None, max_queue: int = 16, **options: Any) -> Iterator[Running]:
    brush, started = Brush(), threading.Event()
    painter = ImageModel(brush, path=Path("flux"), max_queue=max_queue)  # type: ignore[arg-type]
    models = {"flux": painter} if text is None else {"small": text, "flux": painter}
    server = make_server(models, ServerOptions(**options), started.set)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(WAIT_S)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=WAIT_S) as http:
            yield Running(http, brush, painter, server)
    finally:
        brush.go.set()
        server.should_exit = True
        thread.join(WAIT_S)
        painter.close()
        assert not thread.is_alive()
