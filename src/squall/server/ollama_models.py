"""Ollama's lists of models, and what it tells of one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from squall import __version__
from squall.errors import InvalidRequest
from squall.model import Model
from squall.quant import FormatTotal
from squall.server.asking import parse, read_body, takes, work
from squall.server.dialect import Event
from squall.server.ollama import LATEST, MEDIA_TYPE, NamedBody, line, time_of
from squall.text.tools import Tool

if TYPE_CHECKING:
    from squall.server.residence import AnyStanding
    from squall.server.service import Service

# Clients ask whether it is new enough; this one has what is here.
VERSION = "0.12.0"
_FOREVER = timedelta(days=36500)
_TOOL = Tool("f", "", {"type": "object", "properties": {}})


class ModelBody(NamedBody, frozen=True):
    """POST /api/show, and /api/pull, which has a stream."""

    stream: bool = True
    verbose: bool = False
    insecure: bool = False


def add_ollama_models(router: APIRouter, service: Service) -> None:
    lists = _Lists(service)

    @router.get("/api/tags")
    async def tags() -> Response:
        """Ollama's list of models."""
        return JSONResponse({"models": [await lists.tag(one) for one in lists.models]})

    @router.get("/api/ps")
    async def running() -> Response:
        """Ollama's list of the models that are loaded."""
        ready = [one for one in lists.models if one.ready]
        return JSONResponse({"models": [await lists.process(one) for one in ready]})

    async def named(request: Request) -> tuple[ModelBody, AnyStanding]:
        body = await read_body(service, request, partial(parse, ModelBody, service.context))
        return body, service.standing(body.model)

    @router.post("/api/show", openapi_extra=takes(ModelBody))
    async def show(request: Request) -> Response:
        """What a model is, as Ollama tells it."""
        _, standing = await named(request)
        return JSONResponse(await lists.show(standing))

    @router.post("/api/pull", openapi_extra=takes(ModelBody))
    async def pull(request: Request) -> Response:
        """Ollama's download; of models that are served nothing is missing, others are not got."""
        body, _ = await named(request)
        steps = [{"status": "pulling manifest"}, {"status": "success"}]
        if body.stream:
            return Response(b"".join(map(line, steps)), media_type=MEDIA_TYPE)
        return JSONResponse(steps[-1])

    @router.get("/api/version")
    async def version() -> Response:
        """The version of Ollama whose API this is."""
        return JSONResponse({"version": VERSION, "squall": __version__})


class _Lists:
    """What is told of models; of one that is not loaded, what it was when it was."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: dict[str, Event] = {}

    @property
    def models(self) -> list[AnyStanding]:
        return [standing for standing in self._service.all if standing.kind != "pictures"]

    async def tag(self, standing: AnyStanding) -> Event:
        name = standing.name if ":" in standing.name else standing.name + LATEST
        found = await self._about(standing)
        digest = hashlib.sha256(json.dumps([name, found]).encode()).hexdigest()
        told = {"name": name, "model": name, "size": found["size"], "digest": digest}
        modified = time_of(_date(standing.created))
        return {**told, "modified_at": modified, "details": found["details"]}

    async def process(self, standing: AnyStanding) -> Event:
        told, kept_s = await self.tag(standing), standing.keep_alive_s
        stays = standing.pinned or kept_s is None or kept_s < 0
        until = _date(time.time()) + (_FOREVER if stays else timedelta(seconds=kept_s or 0))
        more = {"size_vram": 0, "context_length": standing.model.context}
        return {**told, "expires_at": time_of(until), **more}

    async def show(self, standing: AnyStanding) -> Event:
        found = await self._about(standing)
        told = {name: found[name] for name in ("template", "details", "model_info", "capabilities")}
        more = {"modelfile": f"FROM {standing.name}", "parameters": "", "license": ""}
        return {**told, **more, "modified_at": time_of(_date(standing.created))}

    async def _about(self, standing: AnyStanding) -> Event:
        if standing.ready:
            about = partial(_described, standing.model)
            self._known[standing.name] = await work(self._service, about)
        return self._known.get(standing.name) or _unknown(standing.kind)


def _date(at_s: float) -> datetime:
    return datetime.fromtimestamp(at_s, timezone.utc)


def _unknown(kind: str) -> Event:
    """Of a model that was never loaded."""
    return _told((), "", {}, ["embedding" if kind == "embeddings" else "completion"])


def _described(model: Any) -> Event:
    """A model of text, or an embedder."""
    if not isinstance(model, Model):
        sizes = {"context_length": model.context, "embedding_length": model.width}
        return _told(model.formats, "encoder", sizes, ["embedding"], file=str(model.path))
    does, template, spec = ["completion"], "", model.spec
    with suppress(InvalidRequest):  # there may be no template
        template = model.chat_template.source(with_tools=False)
        prompt = model.chat_prompt([{"role": "user", "content": "Hi"}], tools=[_TOOL])
        does += ["tools"] if prompt.format else []
        does += ["thinking"] if prompt.reasoning else []
    does += ["vision"] if model.sight else []
    does += ["insert"] if model.tokenizer.filling else []
    sizes = {
        "context_length": spec.context, "embedding_length": spec.hidden,
        "block_count": len(spec.layers), "vocab_size": spec.vocab,
    }  # fmt: skip
    path = str(model.checkpoint.path)
    found = _told(model.weight_formats, model.architecture, sizes, does, file=path)
    return {**found, "template": template}


def _told(
    formats: Sequence[FormatTotal], family: str, sizes: Event, does: list[str], *, file: str = ""
) -> Event:
    count = sum(total.parameters for total in formats)
    most = max(formats, key=lambda total: total.parameters, default=None)
    details = {
        "parent_model": "", "format": "gguf" if file.endswith(".gguf") else "safetensors",
        "family": family, "families": [family],
        "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M",
        "quantization_level": "" if most is None else most.format.upper(),
    }  # fmt: skip
    info = {"general.architecture": family, "general.parameter_count": count}
    info |= {f"{family}.{name}": size for name, size in sizes.items()}
    return {
        "size": sum(total.nbytes for total in formats), "details": details, "model_info": info,
        "capabilities": does, "template": "",
    }  # fmt: skip
