"""Ollama's API: chats, completions, embeddings and lists of models in its words."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from squall.api.chats import check_characters
from squall.api.jobs import start_chat, start_completion
from squall.api.messages import MOST_MESSAGES, MOST_PARTS
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.api.responses import ChunkChoice, CompletionChoice
from squall.errors import InvalidRequest
from squall.model import Model
from squall.server.agents import AgentBody, Object, arguments_of
from squall.server.asking import find, respond, takes
from squall.server.dialect import AnyJob, Dialect, Event
from squall.server.embeddings import Text, TextsJob, answer_texts, as_numbers, find_texts
from squall.server.errors import OLLAMA, ApiError
from squall.server.options import duration_s
from squall.server.residence import AnyStanding
from squall.server.schemas import Body, Chosen, Message, Texts

if TYPE_CHECKING:
    from squall.server.service import Service

LATEST = ":latest"  # what clients put after names, and may leave out
MEDIA_TYPE = "application/x-ndjson"
_SAMPLING = {
    "repeat_penalty": "repetition_penalty", "num_predict": "max_tokens",
    **{name: name for name in (
        "frequency_penalty", "min_p", "presence_penalty", "seed", "stop", "temperature", "top_k",
        "top_p",
    )},
}  # fmt: skip
# Of how a model is opened, which is not a client's business.
_OPENING = frozenset({
    "embedding_only", "f16_kv", "logits_all", "low_vram", "main_gpu", "num_batch", "num_ctx",
    "num_gpu", "num_keep", "num_thread", "numa", "use_mlock", "use_mmap", "vocab_only",
})  # fmt: skip
KeepAlive = str | float | None


class NamedBody(Body, frozen=True):
    """What all have in common; `name` is the older word for `model`."""

    model: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        found = {name: value for name, value in given.items() if value is not None}
        name = found.pop("name", None)
        found.setdefault("model", name)
        if isinstance(found["model"], str):
            found["model"] = found["model"].removesuffix(LATEST)
        return found


class OllamaBody(NamedBody, AgentBody, frozen=True):
    """How an answer is made."""

    tool_type = "function"

    model: str
    stream: bool = True
    options: Object = Field(default_factory=dict)
    format: Chosen = ""
    keep_alive: KeepAlive = None
    think: bool | str | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    @property
    def ignored(self) -> list[str]:
        """Also options that are not there."""
        known = _SAMPLING.keys() | _OPENING
        given = {name for name, value in self.options.items() if value is not None}
        return [*super().ignored, *(f"options.{name}" for name in sorted(given - known))]

    def fields(self, defaults: Object) -> Object:
        """What a request has of it, beside what it is about."""
        found = {ours: _whole(v) for name, ours in _SAMPLING.items()
                 if (v := self.options.get(name)) is not None}  # fmt: skip
        for name, least in (("max_tokens", 1), ("seed", 0)):  # below that: without limit, random
            value = found.get(name)
            if isinstance(value, int) and value < least:
                del found[name]
        if self.format == "json":
            found["response_format"] = {"type": "json_object"}
        elif self.format:
            schema = {"name": "format", "schema": self.format}
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {**defaults, **found}

    def as_chat(self, said: list[Object], defaults: Object) -> ChatCompletionRequest:
        found = self.fields(defaults)
        if isinstance(self.think, bool):
            found["chat_template_kwargs"] = {"enable_thinking": self.think}
        else:
            found["reasoning_effort"] = self.think
        return self.chat(said, None, **found)


class OllamaChatBody(OllamaBody, frozen=True):
    """POST /api/chat."""

    messages: list[Message] = Field(default_factory=list, max_length=MOST_MESSAGES)

    @property
    def loads(self) -> bool:
        """Whether nothing is asked, so that only the model is to be loaded, or unloaded."""
        return not self.messages

    def request(self, **defaults: Any) -> ChatCompletionRequest:
        return self.as_chat([*_said(self.messages)], defaults)


class GenerateBody(OllamaBody, frozen=True):
    """POST /api/generate. raw: the prompt is not put into the chat template."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    images: list[str] = Field(default_factory=list, max_length=MOST_PARTS)
    raw: bool = False
    template: str = ""

    @property
    def loads(self) -> bool:
        return not self.prompt and not self.suffix and not self.images

    def request(self, **defaults: Any) -> ChatCompletionRequest | CompletionRequest:
        if self.template:
            raise InvalidRequest("template is not usable here; send the whole prompt, and raw")
        if not self.raw and not self.suffix:
            said = [{"role": "system", "content": self.system}] if self.system else []
            content = _content(self.prompt, self.images)
            return self.as_chat([*said, {"role": "user", "content": content}], defaults)
        if self.images or self.logprobs:
            what = "images is" if self.images else "logprobs is"
            raise InvalidRequest(f"{what} not for prompts that are raw, or have a suffix")
        fields, suffix = self.fields(defaults), self.suffix or None
        return CompletionRequest(prompt=self.prompt, suffix=suffix, stream=self.stream, **fields)


class EmbedBody(NamedBody, frozen=True):
    """POST /api/embed."""

    of: ClassVar[str] = "input"

    input: Texts
    truncate: bool = True
    dimensions: int | None = None
    keep_alive: KeepAlive = None
    options: Object | None = None

    @property
    def texts(self) -> list[Text]:
        return [self.input] if isinstance(self.input, str) else list(self.input)

    def make(self, model: Any, texts: Sequence[Text]) -> tuple[list[str], int]:
        found = model.embed(
            texts, dimensions=self.dimensions, normalize=self.of == "input", truncate=self.truncate
        )
        return [as_numbers(vector) for vector in found.vectors], found.tokens


class OldEmbedBody(EmbedBody, frozen=True):
    """POST /api/embeddings: one text, whose vector is not normalized."""

    of: ClassVar[str] = "prompt"

    input: str = Field(alias="prompt")


def _whole(value: Any) -> Any:
    """A whole number that came as one with a fraction of zero."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _content(text: Any, images: Any) -> Any:
    if not images:
        return text
    if not isinstance(images, list):
        raise InvalidRequest("images must be a list of images in base64")
    pictures = [{"type": "image", "base64": image} for image in images]
    return [{"type": "text", "text": text or ""}, *pictures]


def _said(messages: Iterable[Message]) -> Iterator[Object]:
    """The messages as chats have them; calls and their results get ids, by order and name."""
    waiting: list[tuple[str, object]] = []
    numbers = count()
    for message in messages:
        said = message.model_dump(exclude_none=True)
        said["content"] = _content(said.get("content") or "", said.pop("images", None))
        calls = said.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
            calls = [{"id": f"call{next(numbers):05}", **call} for call in calls]
            functions = [call.get("function") for call in calls]
            names = [f.get("name") if isinstance(f, dict) else None for f in functions]
            waiting += [(str(call["id"]), name) for call, name in zip(calls, names, strict=True)]
            said["tool_calls"] = calls
        if said["role"] == "tool" and waiting:
            name = said.get("tool_name")
            at = next((i for i, (_, called) in enumerate(waiting) if called == name), 0)
            said = {"tool_call_id": waiting.pop(at)[0], "name": name, **said}
        yield said


class OllamaDialect(Dialect):
    """Lines of JSON; the last one, and a whole answer, tell tokens and nanoseconds."""

    media_type = MEDIA_TYPE
    silence = b" "  # which may be before a line's JSON

    def __init__(self, body: OllamaBody, model: str, id: str) -> None:
        super().__init__(body, model, id)
        self._since_s = time.perf_counter()
        self._reason: str | None = None
        self._calls: list[tuple[str, str, str]] = []  # of which the last may go on

    async def whole(self, job: AnyJob) -> str:
        said: dict[str, Any] = {"content": "", "thinking": "", "tool_calls": [], "logprobs": []}
        async for chunk in job.chunks_async():
            for news in self._news(chunk):
                for name, value in news.items():
                    said[name] += value
        said["tool_calls"] += self._called()
        return json.dumps(self._told(said) | self._end(job))

    def part(self, job: AnyJob, chunk: Any) -> bytes:  # noqa: ARG002
        return b"".join(line({**self._told(news), "done": False}) for news in self._news(chunk))

    def end(self, job: AnyJob) -> bytes:
        calls = self._called()
        before = line({**self._told({"tool_calls": calls}), "done": False}) if calls else b""
        return before + line(self._told({}) | self._end(job))

    def failed(self, error: ApiError) -> bytes:
        return error.body(OLLAMA).encode() + b"\n"

    def _told(self, said: Event) -> Event:
        """What was said, as the endpoint tells it."""
        made = {name: value for name, value in said.items() if value and name != "logprobs"}
        message = {"role": "assistant", "content": "", **made}
        told = {"model": self.body.model, "created_at": time_of(), "message": message}
        if isinstance(self.body, GenerateBody):
            del message["role"], told["message"]
            told |= {"response": message.pop("content"), **message}
        return told | ({"logprobs": said["logprobs"]} if said.get("logprobs") else {})

    def _news(self, chunk: Any) -> Iterator[Event]:
        for choice in chunk.choices:
            self._reason = choice.finish_reason or self._reason
            if isinstance(choice, CompletionChoice):
                news: Event = {"content": choice.text}
            else:
                news = self._of_delta(choice)
            if news := {name: value for name, value in news.items() if value}:
                yield news

    def _of_delta(self, choice: ChunkChoice) -> Event:
        delta, done = choice.delta, []
        for call in delta.tool_calls:
            if call.id is not None:
                done += self._called()
                self._calls = [(call.id, call.function.name, "")]
            id, name, text = self._calls[-1]
            self._calls[-1] = (id, name, text + call.function.arguments)
        said = {"content": delta.content, "thinking": delta.reasoning_content, "tool_calls": done}
        tokens = choice.logprobs.content if choice.logprobs else ()
        return {**said, "logprobs": [token.to_dict() for token in tokens]}

    def _called(self) -> list[Event]:
        """The call that is complete by now."""
        calls, self._calls = self._calls, []
        return [
            {"id": id, "function": {"name": name, "arguments": arguments_of(text)}}
            for id, name, text in calls
        ]

    def _end(self, job: AnyJob) -> Event:
        usage = job.usage
        whole_s = max(time.perf_counter() - self._since_s, usage.total_time_sec)
        return {
            "done": True,
            "done_reason": "length" if self._reason == "length" else "stop",
            "total_duration": _ns(whole_s),
            "load_duration": _ns(whole_s - usage.total_time_sec),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _ns(usage.total_prompt_time_sec),
            "eval_count": usage.completion_tokens,
            "eval_duration": _ns(usage.total_completion_time_sec),
        }


class EmbedDialect(Dialect):
    """Vectors; of the older endpoint one, and nothing else."""

    def __init__(self, body: EmbedBody, model: str, id: str) -> None:
        super().__init__(body, model, id)
        self._since_s = time.perf_counter()

    async def whole(self, job: TextsJob[Text, str]) -> str:
        vectors, tokens = await job.all()
        if isinstance(self.body, OldEmbedBody):
            return f'{{"embedding":{vectors[0]}}}'
        whole = _ns(time.perf_counter() - self._since_s)
        told = {"total_duration": whole, "load_duration": 0, "prompt_eval_count": tokens}
        rest = json.dumps({"model": self.body.model, **told})
        return f'{{"embeddings":[{",".join(vectors)}],{rest[1:]}'


def _start(model: Model, asked: ChatCompletionRequest | CompletionRequest, **of: Any) -> AnyJob:
    """A chat; or a completion, whose prompt may have the model's control tokens."""
    if isinstance(asked, ChatCompletionRequest):
        return start_chat(model, asked, **of)
    if asked.suffix is None and isinstance(asked.prompt, str):
        check_characters(model, len(asked.prompt))
        asked = replace(asked, prompt=model.tokenizer.encode(asked.prompt, specials=True))
    return start_completion(model, asked, **of)


def line(event: Event) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _ns(seconds: float) -> int:
    return max(int(seconds * 1e9), 0)


def time_of(at: datetime | None = None) -> str:
    return (at or datetime.now(timezone.utc)).isoformat().replace("+00:00", "Z")


def add_ollama(router: APIRouter, service: Service) -> None:
    async def answer(request: Request, kind: type[OllamaChatBody | GenerateBody]) -> Response:
        body, served = await find(service, request, kind, generates=True)
        if body.loads:
            return JSONResponse(await _loaded(service, served, body))
        _keep(served, body.keep_alive)
        return await respond(service, request, (body, served), _start, OllamaDialect)

    @router.post("/api/chat", openapi_extra=takes(OllamaChatBody))
    async def chat(request: Request) -> Response:
        """Ollama's chat: the next message of a conversation."""
        return await answer(request, OllamaChatBody)

    @router.post("/api/generate", openapi_extra=takes(GenerateBody))
    async def generate(request: Request) -> Response:
        """Ollama's answer to one prompt, in the chat template unless it is raw."""
        return await answer(request, GenerateBody)

    async def embedded(request: Request, kind: type[EmbedBody]) -> Response:
        body, standing = await find_texts(service, request, kind)
        _keep(standing, body.keep_alive)
        return answer_texts(service, request, (body, standing), EmbedDialect)

    @router.post("/api/embed", openapi_extra=takes(EmbedBody))
    async def embed(request: Request) -> Response:
        """Ollama's embeddings: a vector for each text."""
        return await embedded(request, EmbedBody)

    @router.post("/api/embeddings", openapi_extra=takes(OldEmbedBody))
    async def embeddings(request: Request) -> Response:
        """Ollama's older embeddings: a vector for a text."""
        return await embedded(request, OldEmbedBody)


async def _loaded(
    service: Service, served: AnyStanding, body: OllamaChatBody | GenerateBody
) -> Event:
    kept_s = served.keep_alive_s if body.keep_alive is None else duration_s(body.keep_alive)
    unload = body.keep_alive is not None and kept_s == 0
    if unload:
        await service.unload(served.name, wait=True)
    else:
        service.residence.keep(served, kept_s)
        await service.load(served.name)
    chat = isinstance(body, OllamaChatBody)
    said = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    reason = "unload" if unload else "load"
    return {
        "model": body.model,
        "created_at": time_of(),
        **said,
        "done": True,
        "done_reason": reason,
    }


def _keep(standing: AnyStanding, value: KeepAlive) -> None:
    """How long it stays when this request is over."""
    if value is not None:
        standing.keep_alive_s = duration_s(value)
