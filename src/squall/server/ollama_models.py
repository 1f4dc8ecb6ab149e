"""Ollama's lists of models, and what it tells of one."""

from __future__ import annotations

import hashlib
import json
import time
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from squall import __version__
from squall.about import About
from squall.server.asking import parse, read_body, takes
from squall.server.dialect import Event
from squall.server.ollama import LATEST, NamedBody, time_of

if TYPE_CHECKING:
    from squall.server.residence import AnyStanding
    from squall.server.service import Service

# Clients ask whether it is new enough; this one has what is here.
VERSION = "0.12.0"
_FOREVER = timedelta(days=36500)


class ModelBody(NamedBody, frozen=True):
    """POST /api/show, /api/pull, which has a stream, and DELETE /api/delete."""

    stream: bool = True
    verbose: bool = False
    insecure: bool = False


def add_ollama_models(router: APIRouter, service: Service) -> None:
    def models() -> list[AnyStanding]:
        return [standing for standing in service.all if standing.kind != "pictures"]

    async def tag(standing: AnyStanding) -> Event:
        return _tag(standing, await service.learn(standing))

    @router.get("/api/tags")
    async def tags() -> Response:
        """Ollama's list of models."""
        return JSONResponse({"models": [await tag(one) for one in models()]})

    @router.get("/api/ps")
    async def running() -> Response:
        """Ollama's list of the models that are loaded."""
        ready = [(one, _process(one)) for one in models() if one.ready]
        return JSONResponse({"models": [await tag(one) | told for one, told in ready]})

    @router.post("/api/show", openapi_extra=takes(ModelBody))
    async def show(request: Request) -> Response:
        """What a model is, as Ollama tells it."""
        body = await read_body(service, request, partial(parse, ModelBody, service.context))
        standing = service.standing(body.model)
        found = await service.learn(standing)
        told = _tag(standing, found)
        sizes = {f"{found.family}.{name}": size for name, size in found.sizes.items()}
        info = {"general.architecture": found.family, "general.parameter_count": _count(found)}
        more = {"modelfile": f"FROM {standing.name}", "parameters": "", "license": ""}
        return JSONResponse({
            **more, "template": found.template, "details": told["details"],
            "model_info": info | sizes, "capabilities": found.capabilities,
            "modified_at": told["modified_at"],
        })  # fmt: skip

    @router.get("/api/version")
    async def version() -> Response:
        """The version of Ollama whose API this is."""
        return JSONResponse({"version": VERSION, "squall": __version__})


def _tag(standing: AnyStanding, found: About) -> Event:
    name = standing.name if ":" in standing.name else standing.name + LATEST
    count, most = _count(found), max(found.formats, key=lambda f: f.parameters, default=None)
    told = {
        "name": name, "model": name, "size": sum(total.nbytes for total in found.formats),
        "details": {
            "parent_model": "", "family": found.family, "families": [found.family],
            "format": "gguf" if found.path.suffix == ".gguf" else "safetensors",
            "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M",
            "quantization_level": "" if most is None else most.format.upper(),
        },
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return told | {"digest": digest, "modified_at": time_of(_date(standing.created))}


def _count(found: About) -> int:
    return sum(total.parameters for total in found.formats)


def _process(standing: AnyStanding) -> Event:
    kept_s = standing.keep_alive_s
    stays = standing.pinned or kept_s is None or kept_s < 0
    idle_s = 0.0 if standing.users else time.monotonic() - standing.used_s
    left = _FOREVER if stays else timedelta(seconds=(kept_s or 0) - idle_s)
    until = _date(time.time()) + left
    more = {"size_vram": 0, "context_length": standing.model.context}
    return {"expires_at": time_of(until), **more}


def _date(at_s: float) -> datetime:
    return datetime.fromtimestamp(at_s, timezone.utc)
