"""What can be asked over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from squall.adapters.shelf import Info
from squall.api.chats import chat_prompt
from squall.api.jobs import chat_ids, start_completion
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.errors import InvalidRequest
from squall.model import Model
from squall.server import schemas
from squall.server.answer import Answer
from squall.server.anthropic_messages import CountBody, Messages, MessagesBody
from squall.server.asking import (
    REF,
    answer,
    parse,
    read,
    read_body,
    takes,
    visit_of,
    with_images,
    work,
)
from squall.server.dialect import Completions, Dialect
from squall.server.embeddings import EmbeddingsBody, RerankBody, add_embeddings
from squall.server.errors import MESSAGES, ApiError
from squall.server.infill import InfillBody, add_infill
from squall.server.mcp import start_with_tools
from squall.server.metrics import CONTENT_TYPE
from squall.server.ollama import EmbedBody, GenerateBody, OldEmbedBody, OllamaChatBody, add_ollama
from squall.server.ollama_models import ModelBody, add_ollama_models
from squall.server.openai_responses import Responses, ResponsesBody
from squall.server.page import add_page
from squall.server.pictures import FOLDER, EditBody, PictureBody, Pictures, parse_form
from squall.server.pulls import add_pulls
from squall.server.served import Served
from squall.server.service import Service

BODIES: tuple[type[schemas.Body], ...] = (
    schemas.ChatBody, schemas.CompletionBody, ResponsesBody, MessagesBody, CountBody, PictureBody,
    EditBody, EmbeddingsBody, RerankBody, OllamaChatBody, GenerateBody, EmbedBody, OldEmbedBody,
    ModelBody, InfillBody,
    schemas.TokenizeBody, schemas.DetokenizeBody, schemas.ReIsqBody, schemas.ActivateBody,
    schemas.AdapterBody, schemas.LoadBody, schemas.UnloadBody,
)  # fmt: skip
OPENAPI_PATHS = ("/openapi.json", "/api-doc/openapi.json")


def add_routes(app: FastAPI, service: Service) -> None:
    router = APIRouter()
    for add in (
        _add_generation,
        _add_pictures,
        add_embeddings,
        add_infill,
        add_ollama,
        add_ollama_models,
        add_pulls,
        _add_kept,
        _add_tokens,
        _add_models,
        _add_adapters,
        _add_state,
        add_page,
    ):
        add(router, service)
    app.include_router(router)
    _add_documentation(app)


def _add_generation(router: APIRouter, service: Service) -> None:
    begin = partial(start_with_tools, service)

    @router.post("/v1/chat/completions", openapi_extra=takes(schemas.ChatBody))
    async def chat_completions(request: Request) -> Response:
        """The next message of a conversation."""
        return await answer(service, request, schemas.ChatBody, begin, Dialect)

    @router.post("/v1/completions", openapi_extra=takes(schemas.CompletionBody))
    async def completions(request: Request) -> Response:
        """What comes after a text, or after each of several."""
        return await answer(service, request, schemas.CompletionBody, start_completion, Completions)

    @router.post("/v1/responses", openapi_extra=takes(ResponsesBody))
    async def responses(request: Request) -> Response:
        """OpenAI's Responses: the next items of a conversation."""
        tell = partial(Responses, service.kept, visit_of(request).tenant)
        return await answer(service, request, ResponsesBody, begin, tell)

    @router.post(MESSAGES, openapi_extra=takes(MessagesBody))
    async def messages(request: Request) -> Response:
        """Anthropic's Messages: the next message of a conversation."""
        return await answer(service, request, MessagesBody, begin, Messages)


def _add_pictures(router: APIRouter, service: Service) -> None:
    @router.post("/v1/images/generations", openapi_extra=takes(PictureBody))
    async def generations(request: Request) -> Response:
        """Pictures of a text."""
        return await _paint(service, request, partial(parse, PictureBody, service.context))

    @router.post("/v1/images/edits", openapi_extra=takes(EditBody))
    async def edits(request: Request) -> Response:
        """Pictures of a text that begin with another picture; also as a form."""
        kind = request.headers.get("content-type", "")
        if kind.lower().startswith("multipart/form-data"):
            return await _paint(service, request, partial(parse_form, kind))
        return await _paint(service, request, partial(parse, EditBody, service.context))

    @router.get(FOLDER + "{name}")
    async def picture(name: str) -> Response:
        """A picture that was made a while ago."""
        data = await work(service, partial(service.album.find, name))
        kept = f"private, max-age={service.options.image_age_s:.0f}, immutable"
        headers = {"Cache-Control": kept, "X-Content-Type-Options": "nosniff"}
        return Response(data, media_type="image/png", headers=headers)


async def _paint(
    service: Service, request: Request, parse: Callable[[bytes], PictureBody]
) -> Response:
    body = await read_body(service, request, parse)
    if isinstance(body, EditBody):
        visit_of(request).hold(sum(map(len, body.images)))
    painter, told = service.painter(body.model), Pictures(service, body, str(request.base_url)[:-1])
    return Answer(
        service, painter, lambda: told.start(painter.model), told,
        stream=bool(body.stream), reads=isinstance(body, EditBody),
    )  # fmt: skip


def _add_kept(router: APIRouter, service: Service) -> None:
    @router.get("/v1/responses/{id}")
    async def response(request: Request, id: str) -> Response:
        """A response that was stored."""
        told = service.kept.find(visit_of(request).tenant, id)
        return Response(told[0], media_type="application/json")

    @router.delete("/v1/responses/{id}")
    async def forget(request: Request, id: str) -> Response:
        """Forget a response."""
        service.kept.forget(visit_of(request).tenant, id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})


def _add_tokens(router: APIRouter, service: Service) -> None:
    @router.post("/tokenize", openapi_extra=takes(schemas.TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of a conversation."""
        body, served = await read(service, request, schemas.TokenizeBody)
        model = served.model
        if body.prompt is not None and body.messages is None:
            encode = partial(model.encode, body.prompt, add_bos=body.add_special_tokens)
            ids = await work(service, encode)
        else:
            ids = await with_images(service, partial(_as_chat, body), partial(chat_ids, model))
        found = {"tokens": ids, "count": len(ids), "max_model_len": model.context}
        if body.return_token_strs:
            found["token_strs"] = [model.tokenizer.tokens[id_] for id_ in ids]
        return JSONResponse(found)

    @router.post("/render", openapi_extra=takes(schemas.ChatBody))
    async def render(request: Request) -> Response:
        """The prompt of a chat as the model reads it, as text and as token ids."""
        body, served = await read(service, request, schemas.ChatBody)
        return JSONResponse(
            await with_images(service, body.request, partial(_rendered, served.model))
        )

    @router.post("/v1/chat/completions/render", openapi_extra=takes(schemas.ChatBody))
    async def render_chat(request: Request) -> Response:
        """The token ids of a chat's prompt, as vLLM has them."""
        body, served = await read(service, request, schemas.ChatBody)
        ids = await with_images(service, body.request, partial(chat_ids, served.model))
        return JSONResponse({"model": served.name, "token_ids": ids})

    @router.post("/v1/completions/render", openapi_extra=takes(schemas.CompletionBody))
    async def render_completion(request: Request) -> Response:
        """The token ids of each prompt, as vLLM has them."""
        body, served = await read(service, request, schemas.CompletionBody)
        prompts = await work(service, partial(_prompts, served.model, body))
        return JSONResponse([{"model": served.name, "token_ids": ids} for ids in prompts])

    @router.post(f"{MESSAGES}/count_tokens", openapi_extra=takes(CountBody))
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of a message would have."""
        body, served = await read(service, request, CountBody)
        ids = await with_images(service, body.request, partial(chat_ids, served.model))
        return JSONResponse({"input_tokens": len(ids)})

    @router.post("/detokenize", openapi_extra=takes(schemas.DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body, served = await read(service, request, schemas.DetokenizeBody)
        return JSONResponse({"prompt": await work(service, partial(_text, served.model, body))})


def _as_chat(body: schemas.TokenizeBody) -> ChatCompletionRequest:
    if body.prompt is not None or body.messages is None:
        raise InvalidRequest("give a prompt or messages, one of them")
    given = body.given()
    del given["add_special_tokens"]
    given.pop("return_token_strs", None)
    return ChatCompletionRequest(**given)


def _prompts(model: Model, body: schemas.CompletionBody) -> list[list[int]]:
    asked = CompletionRequest(prompt=body.prompt)
    return [model.encode(p) if isinstance(p, str) else [*p] for p in asked.prompts]


def _rendered(model: Model, asked: ChatCompletionRequest) -> dict[str, object]:
    prompt = chat_prompt(model, asked)
    ids = model.encode_prompt(prompt)
    found = {"prompt": prompt.text, "prompt_token_ids": ids, "count": len(ids)}
    return found | {"max_model_len": model.context}


def _text(model: Model, body: schemas.DetokenizeBody) -> str:
    vocab = model.spec.vocab
    wrong = next((id_ for id_ in body.tokens if not 0 <= id_ < vocab), None)
    if wrong is not None:
        raise InvalidRequest(f"token ids go from 0 to {vocab - 1}; found {wrong}")
    return model.decode(body.tokens)


def _add_models(router: APIRouter, service: Service) -> None:
    @router.post("/re_isq", include_in_schema=False)
    async def re_isq(request: Request) -> Response:
        """Quantize the weights again; answers that are under way go on with the new ones."""
        body, served = await read(service, request, schemas.ReIsqBody)
        await work(service, partial(served.re_isq, body.ggml_type))
        return JSONResponse({"ggml_type": body.ggml_type})

    @router.get("/v1/models")
    async def models() -> Response:
        """The models that are served."""
        return JSONResponse({"object": "list", "data": [*(await service.learned()).values()]})

    @router.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        """One model."""
        await service.learn(service.standing(model_id))
        return JSONResponse(service.card(model_id))

    @router.post("/v1/models/{model_id:path}/load")
    async def load(model_id: str) -> Response:
        """Load a model before it is asked for; the answer comes when it is."""
        standing = await service.load(model_id)
        await service.learn(standing)
        return JSONResponse(standing.card)

    @router.post("/v1/models/{model_id:path}/unload")
    async def unload(model_id: str, wait: bool = False) -> Response:
        """Unload a model, if nothing is under way for it; or wait until that has ended."""
        standing = await service.unload(model_id, wait=wait)
        await service.learn(standing)
        return JSONResponse(standing.card)


def _add_adapters(router: APIRouter, service: Service) -> None:
    @router.get("/v1/adapters")
    async def adapters() -> Response:
        """The adapters that there are."""
        found = [(s, info) for s in service.models.values() for info in s.infos]
        return JSONResponse({"object": "list", "data": [_told(*each) for each in found]})

    @router.post("/v1/adapters", openapi_extra=takes(schemas.AdapterBody))
    async def load(request: Request) -> Response:
        """Load an adapter, or replace it; answers that are under way keep what they began with."""
        body, served = await read(service, request, schemas.AdapterBody)
        info = await _put(service, served, body.name, body.path, pinned=body.pinned)
        return JSONResponse(_told(served, info))

    @router.delete("/v1/adapters/{name:path}")
    async def forget(name: str) -> Response:
        """Remove an adapter; answers that are under way keep it."""
        _remove(service, name)
        return JSONResponse({"name": name, "object": "adapter", "deleted": True})

    @router.post("/v1/load_lora_adapter", openapi_extra=takes(schemas.LoadBody))
    async def load_lora(request: Request) -> Response:
        """Load an adapter, as vLLM has it."""
        body, served = await read(service, request, schemas.LoadBody)
        name = body.lora_name
        if name in served.model.adapters and not body.load_inplace:
            why = f"the adapter {name!r:.200} is loaded already; load_inplace replaces it"
            raise ApiError(400, why, "invalid_value", param="lora_name")
        await _put(service, served, name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", openapi_extra=takes(schemas.UnloadBody))
    async def unload_lora(request: Request) -> Response:
        """Remove an adapter, as vLLM has it."""
        body, _ = await read(service, request, schemas.UnloadBody)
        _remove(service, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.post("/activate_adapters", openapi_extra=takes(schemas.ActivateBody))
    async def activate(request: Request) -> Response:
        """The adapters of requests that name none."""
        body, served = await read(service, request, schemas.ActivateBody)
        served.model.adapters.activate(body.adapter_names)
        return JSONResponse({"adapter_names": body.adapter_names})


async def _put(
    service: Service, served: Served, name: str, path: str, *, pinned: bool = False
) -> Info:
    def load() -> Info:
        parent = service.cards.get(name, {}).get("parent")
        if parent not in (None, served.name):
            raise InvalidRequest(f"{name!r:.200} is an adapter of the model {parent!r:.99}")
        return served.model.adapters.load(name, service.adapter_path(path), pinned=pinned)

    return await asyncio.wrap_future(service.submit(load, reads=True))


def _remove(service: Service, name: str) -> None:
    if not service.options.adapter_folders:
        raise service.not_allowed
    models = [served.model for served in service.models.values() if served.ready]
    if not models:
        raise ApiError(409, "no model of text is loaded; load the adapter's first", "not_loaded")
    next((m for m in models if name in m.adapters), models[0]).adapters.remove(name)


def _told(served: Served, adapter: Info) -> dict[str, Any]:
    return {"object": "adapter", "model": served.name, **asdict(adapter)}


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


def _add_documentation(app: FastAPI) -> None:
    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            own = models_json_schema([(body, "validation") for body in BODIES], ref_template=REF)
            FastAPI.openapi(app)["components"]["schemas"] |= own[1]["$defs"]
        return FastAPI.openapi(app)

    app.openapi = describe  # type: ignore[method-assign]

    async def document() -> Response:
        return JSONResponse(app.openapi())

    async def page() -> Response:
        return HTMLResponse(_page(app.openapi()))

    for path in OPENAPI_PATHS:
        app.get(path, include_in_schema=False)(document)
    app.get("/docs", include_in_schema=False)(page)


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
