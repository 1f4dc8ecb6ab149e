"""Embeddings and reranking over HTTP: OpenAI's shape, and that of Jina and Cohere."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from squall.errors import InvalidRequest
from squall.server.answer import Answer
from squall.server.asking import parse, read_body, takes, visit_of
from squall.server.dialect import Dialect
from squall.server.gate import Visit
from squall.server.schemas import Body, Chosen, Prompts

if TYPE_CHECKING:
    from squall.server.served import Encoder
    from squall.server.service import Service

MOST_TEXTS = 2048  # of a request
# So much is computed at a time; then others have their turn, and who is gone gets no more.
_BATCH, _BATCH_CHARACTERS = 64, 1 << 16

Text = str | Sequence[int]
_Text = TypeVar("_Text", bound=Text)
_Made = TypeVar("_Made")
_BodyT = TypeVar("_BodyT", bound=Body)


class EmbeddingsBody(Body, frozen=True):
    """POST /v1/embeddings. An input is text, token ids, or a list of either.

    prompt: a text to put before each, or the name of one of the model's. truncate: cut texts that
    are too long.
    """

    of: ClassVar[str] = "input"

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    prompt: str | None = None
    truncate: bool = False

    @property
    def texts(self) -> list[Text]:
        given: Any = self.input
        alone = isinstance(given, str) or (len(given) and isinstance(given[0], int))
        return [given] if alone else list(given)

    def make(self, model: Any, texts: Sequence[Text]) -> tuple[list[str], int]:
        write = _as_base64 if self.encoding_format == "base64" else as_numbers
        found = model.embed(
            texts, prompt=self.prompt, dimensions=self.dimensions, truncate=self.truncate
        )
        return [write(vector) for vector in found.vectors], found.tokens


class RerankBody(Body, frozen=True):
    """POST /v1/rerank. Documents are texts, or objects with a `text`."""

    of: ClassVar[str] = "documents"

    query: str
    documents: Annotated[list[Chosen], Field(max_length=MOST_TEXTS)]
    top_n: int | None = None
    return_documents: bool = False
    truncate: bool = False

    @property
    def texts(self) -> list[str]:
        found = [each if isinstance(each, str) else each.get("text") for each in self.documents]
        for i, text in enumerate(found):
            if not isinstance(text, str):
                raise InvalidRequest(f"documents[{i}] must be a text, or an object with a text")
        checked([self.query], "query")
        if self.top_n is not None and self.top_n < 1:
            raise InvalidRequest(f"top_n is {self.top_n}; it must be at least 1")
        return [str(text) for text in found]

    def make(self, model: Any, texts: Sequence[str]) -> tuple[list[float], int]:
        found = model.rerank(self.query, texts, truncate=self.truncate)
        return found.scores.tolist(), found.tokens


@dataclass(eq=False)
class TextsJob(Generic[_Text, _Made]):
    """What `make` makes of texts and how many tokens they had, some of them at a time."""

    service: Service
    visit: Visit
    model: str
    texts: Sequence[_Text]
    make: Callable[[Sequence[_Text]], tuple[Sequence[_Made], int]]
    usage: None = None

    def __post_init__(self) -> None:
        self.visit.hold(sum(map(len, self.texts)))

    async def all(self) -> tuple[list[_Made], int]:
        made: list[_Made] = []
        tokens = 0
        async for some, more in self.chunks_async():
            made += some
            tokens += more
        self.service.metrics.embedded.labels(self.model).inc(tokens)
        self.visit.notes |= {"texts": len(made), "prompt_tokens": tokens}
        return made, tokens

    async def chunks_async(self) -> AsyncIterator[tuple[Sequence[_Made], int]]:
        for batch in _batches(self.texts):
            yield await _beside(self.service, partial(self.make, batch))

    def close(self) -> None:
        """What is being computed ends by itself, and is not told."""


class EmbeddingsDialect(Dialect):
    """OpenAI's list of embeddings."""

    async def whole(self, job: TextsJob[Text, str]) -> str:
        made, tokens = await job.all()
        data = ",".join(
            f'{{"object":"embedding","index":{i},"embedding":{vector}}}'
            for i, vector in enumerate(made)
        )
        usage = json.dumps({"prompt_tokens": tokens, "total_tokens": tokens})
        name = json.dumps(self.model)
        return f'{{"object":"list","data":[{data}],"model":{name},"usage":{usage}}}'


class RerankDialect(Dialect):
    """Jina's list of results, the best first."""

    prefix = "rerank-"

    async def whole(self, job: TextsJob[str, float]) -> str:
        scores, tokens = await job.all()
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: self.body.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in best]
        if self.body.return_documents:
            results = [{**one, "document": {"text": job.texts[one["index"]]}} for one in results]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        found = {"id": self.id, "model": self.model, "results": results, "usage": usage}
        return json.dumps({"object": "list", **found})


async def find_texts(
    service: Service, request: Request, kind: type[_BodyT]
) -> tuple[_BodyT, Encoder]:
    """A body with `texts`, which are in its field `of`, and the model that it is for."""
    body = await read_body(service, request, partial(parse, kind, service.context))
    return body, service.embedder(body.model)


def answer_texts(
    service: Service, request: Request, found: tuple[Any, Encoder], tell: Callable[..., Dialect]
) -> Response:
    """What the model makes of the texts, as the body's `make` says."""
    (body, standing), visit = found, visit_of(request)
    texts = checked(body.texts, body.of)
    job: TextsJob[Any, Any] = TextsJob(
        service, visit, standing.name, texts, lambda some: body.make(standing.model, some)
    )
    told = tell(body, standing.name, visit.id)
    return Answer(service, standing, lambda: job, told, stream=False, reads=False)


def add_embeddings(router: APIRouter, service: Service) -> None:
    @router.post("/v1/embeddings", openapi_extra=takes(EmbeddingsBody))
    async def embeddings(request: Request) -> Response:
        """A vector for each text."""
        found = await find_texts(service, request, EmbeddingsBody)
        return answer_texts(service, request, found, EmbeddingsDialect)

    async def rerank(request: Request) -> Response:
        """How well each document answers the query, the best first."""
        found = await find_texts(service, request, RerankBody)
        return answer_texts(service, request, found, RerankDialect)

    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        shown = path.startswith("/v1")
        router.post(path, include_in_schema=shown, openapi_extra=takes(RerankBody))(rerank)


def checked(texts: list[_Text], name: str) -> list[_Text]:
    """The same, if there are some, not too many, and none is empty. Raises InvalidRequest."""
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise InvalidRequest(f"{name} has {len(texts)} texts; it must have 1 to {MOST_TEXTS}")
    for i, text in enumerate(texts):
        if not len(text):
            raise InvalidRequest(f"{name} has an empty text, at {i}; leave it out")
    return texts


async def _beside(service: Service, function: Callable[[], _Made]) -> _Made:
    return await asyncio.wrap_future(service.submit(function, reads=True))


def _batches(texts: Sequence[_Text]) -> list[Sequence[_Text]]:
    found: list[Sequence[_Text]] = []
    first = size = 0
    for i, text in enumerate(texts):
        if i > first and (i - first == _BATCH or size + len(text) > _BATCH_CHARACTERS):
            found.append(texts[first:i])
            first, size = i, 0
        size += len(text)
    return [*found, texts[first:]]


def as_numbers(vector: Any) -> str:
    return json.dumps(vector.tolist(), separators=(",", ":"))


def _as_base64(vector: Any) -> str:
    return f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"'
