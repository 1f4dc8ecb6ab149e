"""llama.cpp's /infill: what editors ask for while somebody types."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from squall.api.chats import check_characters
from squall.api.jobs import start_completion
from squall.api.requests import CompletionRequest
from squall.api.responses import Usage
from squall.model import Model
from squall.server.asking import find, respond, takes
from squall.server.dialect import AnyJob, Dialect, Event
from squall.server.schemas import GenerationBody

if TYPE_CHECKING:
    from squall.server.service import Service

MOST_FILES, MOST_FIELDS = 1024, 64
ROOM = 128  # tokens kept for an answer of which nobody says how long it may be


class File(BaseModel):
    """Another file of the project, or a part of one."""

    model_config = ConfigDict(strict=True)

    text: str
    filename: str = "file"


class InfillBody(GenerationBody, frozen=True):
    """POST /infill. `prompt` is the end of the prefix: the beginning of the cursor's line.

    t_max_predict_ms: the answer ends after so long, once it has a line.
    response_fields: of the answer only these, such as timings/prompt_ms.
    """

    n: Literal[1] | None = None
    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[File], Field(max_length=MOST_FILES)] = Field(default_factory=list)
    prompt: str = ""
    n_predict: int | None = None
    repeat_penalty: float | None = None
    t_max_predict_ms: float | None = None
    response_fields: Annotated[list[str], Field(max_length=MOST_FIELDS)] | None = None

    def request(self, **defaults: Any) -> CompletionRequest:
        given, most = self.given(), self.n_predict
        own = {name: given[name] for name in given.keys() & GenerationBody.model_fields.keys()}
        if most is not None and most >= 0:
            own["max_tokens"] = max(most, 1)  # 0: the prompt is only to be in the cache
        own["repetition_penalty"] = given.get("repeat_penalty", own.get("repetition_penalty"))
        prompt = self.input_prefix + self.prompt
        return CompletionRequest(**{**defaults, **own}, prompt=prompt, suffix=self.input_suffix)


@dataclass(eq=False)
class _Timed:
    """A job that ends early where it takes long."""

    job: AnyJob
    most_s: float

    @property
    def usage(self) -> Usage:
        return self.job.usage

    @property
    def stopped(self) -> str:
        return self.job.stopped

    async def chunks_async(self) -> AsyncIterator[Any]:
        lines, since_s = 0, 0.0
        async for chunk in self.job.chunks_async():
            yield chunk
            since_s = since_s or time.perf_counter()
            lines += any("\n" in choice.text for choice in chunk.choices)
            if lines and time.perf_counter() - since_s > self.most_s:
                return

    def close(self) -> None:
        self.job.close()


class Infill(Dialect):
    """llama.cpp's completions."""

    reason: str | None = None

    async def whole(self, job: AnyJob) -> str:
        text = "".join([self._text(chunk) async for chunk in job.chunks_async()])
        told, fields = self._end(job, text), self.body.response_fields
        if fields is None:
            return json.dumps(told)
        found = {path: _at(told, path.split("/")) for path in fields}
        return json.dumps({path: value for path, value in found.items() if value is not None})

    def part(self, job: AnyJob, chunk: Any) -> bytes:
        usage = job.usage
        told = {
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
        }
        return _event({"index": 0, "content": self._text(chunk), "stop": False, **told})

    def end(self, job: AnyJob) -> bytes:
        return _event(self._end(job, ""))

    def _text(self, chunk: Any) -> str:
        for choice in chunk.choices:
            self.reason = choice.finish_reason or self.reason
        return "" if self.body.n_predict == 0 else "".join(c.text for c in chunk.choices)

    def _end(self, job: AnyJob, text: str) -> Event:
        usage, word = job.usage, job.stopped
        cached, predicted = usage.prompt_tokens_details.cached_tokens, usage.completion_tokens
        ended = "word" if word else "eos" if self.reason == "stop" else "limit"
        return {
            "index": 0, "content": text, "stop": True, "model": self.model, "stop_type": ended,
            "stopping_word": word, "tokens_predicted": predicted, "truncated": False,
            "tokens_evaluated": usage.prompt_tokens, "tokens_cached": usage.total_tokens,
            "timings": {"cache_n": cached}
            | _timing("prompt", usage.prompt_tokens - cached, usage.total_prompt_time_sec)
            | _timing("predicted", predicted, usage.total_completion_time_sec),
        }  # fmt: skip


def add_infill(router: APIRouter, service: Service) -> None:
    @router.post("/infill", openapi_extra=takes(InfillBody))
    async def infill(request: Request) -> Response:
        """llama.cpp's infill: what is between two texts, with other files in view."""
        found = await find(service, request, InfillBody, generates=True)
        return await respond(service, request, found, partial(_start, found[0]), Infill)


def _start(body: InfillBody, model: Model, asked: CompletionRequest, **of: Any) -> AnyJob | _Timed:
    check_characters(model, len(asked.prompt) + len(body.input_suffix))
    files = [(file.filename, file.text) for file in body.input_extra]
    most = model.context - (asked.max_tokens or ROOM)
    ids = model.tokenizer.encode_fill(str(asked.prompt), body.input_suffix, files, most)
    job = start_completion(model, replace(asked, prompt=ids, suffix=None), **of)
    limit_ms = body.t_max_predict_ms
    return job if limit_ms is None or limit_ms <= 0 else _Timed(job, limit_ms / 1000)


def _timing(name: str, count: int, seconds: float) -> Event:
    return {
        f"{name}_n": count, f"{name}_ms": seconds * 1000,
        f"{name}_per_token_ms": seconds * 1000 / max(count, 1),
        f"{name}_per_second": count / seconds if seconds else 0.0,
    }  # fmt: skip


def _at(told: Any, path: list[str]) -> Any:
    for name in path:
        told = told.get(name) if isinstance(told, dict) else None
    return told


def _event(told: Event) -> bytes:
    return f"data: {json.dumps(told)}\n\n".encode()
