"""How endpoints read a request, find its model, and work beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from squall.api.messages import images_of
from squall.server import schemas
from squall.server.answer import Answer
from squall.server.dialect import Dialect, Running
from squall.server.errors import ApiError
from squall.server.gate import Visit
from squall.server.limits import check_encoding, check_values
from squall.server.residence import AnyStanding
from squall.server.served import Served
from squall.server.service import Service

REF = "#/components/schemas/{model}"

_BodyT = TypeVar("_BodyT", bound=schemas.Body)
_Value = TypeVar("_Value")


async def answer(
    service: Service, request: Request, kind: type[schemas.GenerationBody],
    begin: Callable[..., Running], tell: Callable[..., Dialect],
) -> Response:  # fmt: skip
    found = await find(service, request, kind, generates=True)
    return await respond(service, request, found, begin, tell)


async def respond(
    service: Service, request: Request, found: tuple[schemas.GenerationBody, Served],
    begin: Callable[..., Running], tell: Callable[..., Dialect],
) -> Response:  # fmt: skip
    """The answer to a body, of the model that it is for."""
    (body, served), visit = found, visit_of(request)
    defaults = served.asked(body)
    told = tell(body, defaults["model"], visit.id)

    asked = await work(service, partial(told.request, **defaults))
    images = [part["source"] for part in images_of(getattr(asked, "messages", ()))]
    visit.hold(sum(map(len, images)))

    def start() -> Running:
        return begin(served.model, asked, id=told.id, tenant=visit.tenant)

    reads = bool(images) or not served.has(defaults.get("adapters", body.adapters))
    return Answer(service, served, start, told, stream=bool(body.stream), reads=reads)


def takes(body: type[schemas.Body]) -> dict[str, Any]:
    """What a route says of its body; the route reads it itself, within limits."""
    schema = {"$ref": REF.format(model=body.__name__)}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def visit_of(request: Request) -> Visit:
    visit: Visit = request.scope["state"]["visit"]
    return visit


async def read(service: Service, request: Request, kind: type[_BodyT]) -> tuple[_BodyT, Served]:
    """The body, and the model of text that it is for, loaded; otherwise as `read_body`."""
    body, served = await find(service, request, kind)
    await use(service, request, served)
    return body, served


async def use(service: Service, request: Request, standing: AnyStanding) -> None:
    """The request has the model until it is over; it is loaded first. Raises ApiError.

    An `Answer` does so itself, as a stream is told something meanwhile.
    """
    await service.use(standing, visit_of(request))


async def find(
    service: Service, request: Request, kind: type[_BodyT], *, generates: bool = False
) -> tuple[_BodyT, Served]:
    """The body, and the model of text that it is for, which may not be loaded."""
    service.check_ready()
    service.check_room()
    visit, served = visit_of(request), service.sole
    if generates and served is not None and len(service.all) == 1:
        visit.enter(served)  # before anything is read: the others' model is in the body
    body = await read_body(service, request, partial(parse, kind, service.context))
    served = service.find(body.model)
    if generates:
        visit.enter(served)
    return body, served


async def read_body(service: Service, request: Request, parse: Callable[[bytes], _BodyT]) -> _BodyT:
    """The body, checked; raises ApiError and others of `to_api`."""
    service.check_ready()
    service.check_room()
    visit = visit_of(request)
    check_encoding(request.headers.get("content-encoding"))
    declared = request.headers.get("content-length")
    async with service.bodies.read(request.receive, declared) as data:
        service.log.body("request", visit.id, data)
        body = await work(service, partial(parse, data))
    visit.ignore(body.ignored)
    if body.ignored and service.options.strict_fields:
        name = body.ignored[0][:100]
        raise ApiError(400, f"unknown parameter: {name!r}", "unknown_parameter", param=name)
    return body


def parse(kind: type[_BodyT], context: int, data: bytes) -> _BodyT:
    check_values(data, context)
    return kind.parse(data)


async def work(service: Service, function: Callable[[], _Value]) -> _Value:
    return await asyncio.wrap_future(service.submit(function))


async def with_images(
    service: Service, ask: Callable[[], Any], answer: Callable[[Any], _Value]
) -> _Value:
    asked = await work(service, ask)
    reads = bool(images_of(asked.messages))
    return await asyncio.wrap_future(service.submit(partial(answer, asked), reads=reads))
