"""Errors as OpenAI's error object, or Anthropic's, each with its HTTP status."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from squall import errors
from squall.api.requests import NUMBERS
from squall.engine.fields import complaint

LOGGER = logging.getLogger("squall.server")
INVALID = "invalid_request_error"
RETRY_S = 5  # a guess when another server will have taken this one's place
MESSAGES = "/v1/messages"  # below this path errors are as Anthropic has them
OLLAMA = "/api/"  # and below this one as Ollama has them
_ANTHROPIC = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip
_OTHERS = ("PictureBody", "EditBody")  # whose numbers are not those of sampling
TAG = "~"  # marks which member of a union an error is about, which is no part of a field's name
MOST_MESSAGE = 1000  # characters of what clients are told


@dataclass(eq=False)
class ApiError(Exception):
    """An error as clients see it. `param` is the request's field that is wrong."""

    status: int
    message: str
    code: str | None = None
    type: str = INVALID
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, path: str = "") -> str:
        """The JSON object, in the shape that clients of the path know."""
        text = self.message
        if len(text) > MOST_MESSAGE:
            text = text[:MOST_MESSAGE] + " ..."
        if path.startswith(MESSAGES):
            kind = _ANTHROPIC.get(self.status, INVALID if self.status < 500 else "api_error")
            return json.dumps({"type": "error", "error": {"type": kind, "message": text}})
        if path.startswith(OLLAMA):
            return json.dumps({"error": text})
        told = {"message": text, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": told})

    def response(self, path: str) -> Response:
        body, headers = self.body(path), {**self.headers}
        return Response(body, self.status, headers, media_type="application/json")


# The first that fits, so a subclass stands before its base: status, type, code.
_KINDS: dict[type[errors.SquallError], tuple[int, str, str | None]] = {
    errors.ContextLengthExceeded: (400, INVALID, "context_length_exceeded"),
    errors.TemplateError: (400, INVALID, "template_error"),
    errors.InvalidRequest: (400, INVALID, "invalid_value"),
    errors.InvalidCheckpoint: (400, INVALID, "invalid_checkpoint"),
    errors.UnsupportedModel: (400, INVALID, "unsupported_model"),
    errors.ModelNotFound: (404, INVALID, "model_not_found"),
    errors.QueueFull: (429, "rate_limit_error", "rate_limit_exceeded"),
    errors.EngineStopped: (503, "server_error", "engine_stopped"),
    errors.OutOfMemory: (503, "server_error", "out_of_memory"),
    errors.SamplingFailed: (500, "server_error", "sampling_failed"),
}

# The engine's own words tell of what went wrong inside.
_STOPPED = "the engine has stopped; ask again in a while, or another server"
_FIELD = re.compile(r"([a-z]+(?:_[a-z]+)*(?:\[\d+\])?(?:\.[a-z_]+)?) (?:is|has|must|needs) ")


def stopped(why: str) -> ApiError:
    status, type_, code = _KINDS[errors.EngineStopped]
    return ApiError(status, why, code, type_, headers={"Retry-After": str(RETRY_S)})


def to_api(error: BaseException) -> ApiError:
    """Any error as clients see it. What nobody foresaw is logged and not described to them."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers or {})
    for kind, (status, type_, code) in _KINDS.items():
        if isinstance(error, kind):
            # Messages about a field begin with its name.
            field = _FIELD.match(str(error)) if status == 400 else None
            text = _STOPPED if kind is errors.EngineStopped else str(error)
            found = ApiError(status, text, code, type_, field[1] if field else None)
            retry_s = getattr(error, "retry_after_s", RETRY_S)
            found.headers = {"Retry-After": str(retry_s)} if status in (429, 503) else {}
            return found
    LOGGER.error("an unforeseen error", exc_info=error)
    return ApiError(
        500, "an internal error; the server's log says more", "internal_error", "server_error"
    )


def _invalid(error: ValidationError) -> ApiError:
    """The first complaint about a body, naming the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg']}", "invalid_json")
    where = ""
    for part in first["loc"]:
        if str(part).startswith(TAG) or part == "[key]":
            continue
        name = str(part)[:100]  # which a client may have given
        where += f"[{name}]" if isinstance(part, int) else f".{name}" if where else name
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = f"{where}: {first['msg']}" if where else first["msg"]
    if where in NUMBERS and error.title not in _OTHERS:
        message = complaint(where, first["input"], NUMBERS[where].allowed)
    return ApiError(400, message, code, param=where or None)
