"""What can be asked over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from squall.api.jobs import start_chat, start_completion
from squall.errors import InvalidRequest
from squall.server.answer import Answer, AnyJob
from squall.server.errors import ApiError
from squall.server.gate import Visit
from squall.server.limits import check_values
from squall.server.metrics import CONTENT_TYPE
from squall.server.schemas import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    ReIsqBody,
    TokenizeBody,
)
from squall.server.service import Service

BODIES: tuple[type[Body], ...] = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, ReIsqBody)
# The seed API has these; what they need is not there yet.
NOT_YET = {
    "/activate_adapters": "adapters",
    "/v1/images/generations": "images",
}
OPENAPI_PATHS = ("/openapi.json", "/api-doc/openapi.json")

_BodyT = TypeVar("_BodyT", bound=Body)
_Value = TypeVar("_Value")


def add_routes(app: FastAPI, service: Service) -> None:
    """All routes of a server."""
    router = APIRouter()
    for add in (_add_generation, _add_tokens, _add_models, _add_state, _add_not_yet):
        add(router, service)
    app.include_router(router)
    _add_documentation(app)


def _add_generation(router: APIRouter, service: Service) -> None:
    @router.post("/v1/chat/completions", openapi_extra=_takes(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """The next message of a conversation."""
        body = await _read(service, request, ChatBody)
        visit = _visit(request)

        def start() -> AnyJob:
            asked = body.request(**service.defaults)
            id_ = f"chatcmpl-{visit.id}"
            return start_chat(service.model, asked, id=id_, tenant=visit.tenant)

        return Answer(service, start, stream=bool(body.stream))

    @router.post("/v1/completions", openapi_extra=_takes(CompletionBody))
    async def completions(request: Request) -> Response:
        """What comes after a text, or after each of several."""
        body = await _read(service, request, CompletionBody)
        visit = _visit(request)

        def start() -> AnyJob:
            asked = body.request(**service.defaults)
            id_ = f"cmpl-{visit.id}"
            return start_completion(service.model, asked, id=id_, tenant=visit.tenant)

        return Answer(service, start, stream=bool(body.stream))


def _add_tokens(router: APIRouter, service: Service) -> None:
    model = service.model

    @router.post("/tokenize", openapi_extra=_takes(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of a conversation."""
        body = await _read(service, request, TokenizeBody)
        ids = await _work(service, partial(_ids, body))
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    def _ids(body: TokenizeBody) -> list[int]:
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give a prompt or messages, one of them")
        if body.prompt is not None:
            return model.encode(body.prompt, add_bos=body.add_special_tokens)
        messages = [message.model_dump() for message in body.messages or ()]
        return model.encode_chat(messages)

    @router.post("/detokenize", openapi_extra=_takes(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body = await _read(service, request, DetokenizeBody)
        return JSONResponse({"prompt": await _work(service, partial(_text, body))})

    def _text(body: DetokenizeBody) -> str:
        vocab = model.spec.vocab
        wrong = next((id_ for id_ in body.tokens if not 0 <= id_ < vocab), None)
        if wrong is not None:
            raise InvalidRequest(f"token ids go from 0 to {vocab - 1}; found {wrong}")
        return model.decode(body.tokens)


def _add_models(router: APIRouter, service: Service) -> None:
    card = {
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "local",
        "max_model_len": service.model.context,
    }

    @router.post("/re_isq", include_in_schema=False)
    async def re_isq(request: Request) -> Response:
        """Quantize the weights again; answers that are under way go on with the new ones."""
        body = await _read(service, request, ReIsqBody)
        await _work(service, partial(service.model.re_isq, body.ggml_type))
        return JSONResponse({"ggml_type": body.ggml_type})

    @router.get("/v1/models")
    async def models() -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [card]})

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """One model."""
        _check_model(service, model_id)
        return JSONResponse(card)


def _add_state(router: APIRouter, service: Service) -> None:
    @router.get("/")
    @router.get("/health")
    async def health() -> Response:
        """OK while requests are taken; 503 when shutting down, or with an engine that is dead."""
        service.check_ready()
        return PlainTextResponse("OK")

    @router.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_not_yet(router: APIRouter, service: Service) -> None:  # noqa: ARG001
    def refuse(what: str) -> Callable[[], Any]:
        async def refused() -> Response:
            raise ApiError(501, f"{what}: not supported yet", "not_supported")

        return refused

    for path, what in NOT_YET.items():
        router.post(path, include_in_schema=False)(refuse(what))


def _add_documentation(app: FastAPI) -> None:
    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, schemas = models_json_schema(
                [(body, "validation") for body in BODIES], ref_template=_REF
            )
            found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]

    async def document() -> Response:
        return JSONResponse(app.openapi())

    async def page() -> Response:
        return HTMLResponse(_page(app.openapi()))

    for path in OPENAPI_PATHS:
        app.get(path, include_in_schema=False)(document)
    app.get("/docs", include_in_schema=False)(page)


_REF = "#/components/schemas/{model}"


def _takes(body: type[Body]) -> dict[str, Any]:
    """What a route says of its body; the route reads it itself, within limits."""
    schema = {"$ref": _REF.format(model=body.__name__)}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def _visit(request: Request) -> Visit:
    visit: Visit = request.scope["state"]["visit"]
    return visit


async def _read(service: Service, request: Request, kind: type[_BodyT]) -> _BodyT:
    """The body, checked; raises ApiError and others of `errors.to_api`."""
    service.check_ready()
    service.check_room()
    visit = _visit(request)
    if issubclass(kind, GenerationBody):
        visit.enter()
    with service.bodies.hold() as held:
        data = await held.read(request.receive, request.headers.get("content-length"))
        service.log.body("request", visit.id, data)
        body = await _work(service, partial(_parse, kind, data, service.model.context))
    _check_model(service, body.model)
    return body


def _parse(kind: type[_BodyT], data: bytes, context: int) -> _BodyT:
    check_values(data, context)
    return kind.parse(data)


def _check_model(service: Service, name: str | None) -> None:
    if name not in (None, "default", service.model_id):
        raise ApiError(
            404, f"there is no model {name!r:.200}; this server has {service.model_id!r}",
            "model_not_found", param="model",
        )  # fmt: skip


async def _work(service: Service, function: Callable[[], _Value]) -> _Value:
    return await asyncio.wrap_future(service.submit(function))


def _page(document: dict[str, Any]) -> str:
    """The API on a page that needs nothing from elsewhere."""
    rows = "".join(
        f"<tr><td>{method.upper()}<td><code>{escape(path)}</code>"
        f"<td>{escape(operation.get('description', ''))}"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return (
        "<!doctype html><meta charset=utf-8><title>Squall</title>"
        f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>"
        f"<p>{escape(document['info']['description'])} Its fields are described in "
        f"<a href={OPENAPI_PATHS[0]}>{OPENAPI_PATHS[0]}</a>.<table>{rows}</table>"
    )
