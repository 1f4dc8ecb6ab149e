"""`create_app`: a model as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from squall import __version__
from squall.checkpoints.hub import name_of
from squall.model import Model
from squall.server.errors import INVALID, ApiError, to_api
from squall.server.gate import IGNORED, Gate
from squall.server.options import ServerOptions
from squall.server.routes import add_routes
from squall.server.service import Models, Service


def create_app(models: Models, options: ServerOptions | None = None) -> FastAPI:
    """The application, of one model or of several by their names.

    Open ones stay open. Those that are `Lazy` are opened, and closed, by the application.

    `squall.server.run.serve_on` runs it with time limits and an orderly end; other ASGI servers can
    run it as well, one process only.
    """
    options = options or ServerOptions()
    if not isinstance(models, Mapping):
        path = models.checkpoint.path if isinstance(models, Model) else models.path
        models = {options.model_id or name_of(path): models}
    service = Service(models, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(service.run())
        yield
        watching.cancel()
        await service.close()

    app = FastAPI(
        title="Squall",
        version=__version__,
        description="OpenAI's API, and Anthropic's Messages.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere; ours needs no network
        redoc_url=None,
        openapi_url=None,
    )
    app.state.service = service
    app.add_exception_handler(HTTPException, _http_error)
    add_routes(app, service)
    app.add_middleware(Gate, service=service)
    if service.options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.options.origins,
            allow_methods=["DELETE", "GET", "HEAD", "POST"],
            allow_headers=["*"],  # whatever a client's preflight asks for
            expose_headers=["X-Request-Id", "Retry-After", IGNORED],
        )
    return app


def service_of(app: FastAPI) -> Service:
    service: Service = app.state.service
    return service


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the form of all errors."""
    found = to_api(error)
    if found.status == 404:
        found = ApiError(
            404, f"unknown path {request.url.path[:200]!r}; /docs lists those there are",
            "unknown_url",
        )  # fmt: skip
    elif found.status == 405 and request.method == "OPTIONS":
        allowed = found.headers.get("Allow", "").replace("GET", "GET, HEAD")
        return Response(status_code=204, headers={"Allow": f"{allowed}, OPTIONS"})
    elif found.status == 405:
        found = ApiError(
            405, f"{request.method} is not for this path", "method_not_allowed", INVALID,
            headers=found.headers,
        )  # fmt: skip
    return found.response(request.url.path)
