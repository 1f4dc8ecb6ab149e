"""Jobs: a request of the API while it is answered, as a response or as chunks, now or awaited.

Each answer of a job is a request of the engine; they share what their prompts have in common.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

from squall.api import chats, responses
from squall.api.logprobs import Entry, PromptScores, Tokens, chat_logprobs, completion_logprobs
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.api.structure import naming
from squall.closing import Closing
from squall.engine.generation import Mailbox
from squall.engine.reply import Reply
from squall.engine.request import Piece, Request, Scoring
from squall.engine.sampling import Sampling
from squall.errors import InvalidRequest
from squall.model import Model, Prompt
from squall.text.chat import ChatPrompt

# OpenAI's defaults, and mistral.rs's: a plain draw.
DRAW = {"temperature": 1.0, "top_p": 1.0}
Asked = TypeVar("Asked", bound=ChatCompletionRequest | CompletionRequest)
Whole = TypeVar("Whole")
Part = TypeVar("Part")


def start_chat(
    model: Model, request: ChatCompletionRequest, *, id: str | None = None, tenant: str = ""
) -> ChatJob:
    """Begin to answer a chat. Requests share cached prefixes with others of the same tenant only.

    Raises InvalidRequest, ContextLengthExceeded, TemplateError, QueueFull or EngineStopped.
    """
    _check_count(model, request.n)
    prompt = chats.chat_prompt(model, request)
    asked = replace(
        _request(model, request, prompt, tenant),
        max_tokens=request.max_tokens,
        logprobs=request.top_logprobs or 0 if request.logprobs else None,
        continues=request.structure() is not None,  # tools leave words as they are
    )
    job = ChatJob(model, request, id, prompt)
    job.submit(
        (one, _Choice(0, _tokens(model, asked, wanted=request.logprobs)))
        for one in _drawn_apart(asked, request.n)
    )
    return job


def chat_ids(model: Model, request: ChatCompletionRequest) -> list[int]:
    return model.encode_prompt(chats.chat_prompt(model, request))


def start_completion(
    model: Model, request: CompletionRequest, *, id: str | None = None, tenant: str = ""
) -> CompletionJob:
    """Begin to complete a text or several; otherwise as `start_chat`."""
    _check_count(model, len(request.prompts) * request.candidates)
    answers: list[tuple[Request, _Choice]] = []
    for number, prompt in enumerate(request.prompts):
        chats.check_characters(model, len(prompt) + len(request.suffix or ""))
        asked = _request(model, request, _read(model, request, prompt), tenant)
        if answers:  # the versions of adapters that the first prompt has
            asked = replace(asked, adapters=answers[0][0].adapters, scope=answers[0][0].scope)
        answers += [
            _completion(model, request, one, number)
            for one in _drawn_apart(asked, request.candidates)
        ]
    job = CompletionJob(model, request, id)
    job.submit(answers)
    return job


class _Choice:
    """One answer, as far as it is known; it begins with the prompt if that is echoed."""

    answer: Reply
    new: str  # the end of the text

    def __init__(
        self, prompt: int, tokens: Tokens, text: str = "", scores: PromptScores | None = None
    ) -> None:
        self.prompt = prompt
        self.tokens = tokens
        self.text = text
        self.finish_reason: str | None = None
        self._scores = scores
        self._told = False

    def take(self, piece: Piece) -> None:
        if self._scores is not None:
            self.tokens.add_prompt(self._scores)
            self._scores = None
        self.new = piece.text
        self.text += self.new
        self.tokens.take(piece, len(self.text))
        reason = piece.finish_reason
        self.finish_reason = "canceled" if reason == "cancelled" else reason

    def news(self) -> list[Entry]:
        """Tokens that were not asked for before."""
        return self.tokens.news(len(self.text), done=self.finish_reason is not None)

    def is_first(self) -> bool:
        """Whether this was not asked before."""
        told, self._told = self._told, True
        return not told


class Job(Closing, ABC, Generic[Asked, Whole, Part]):
    """Answers in the making. They go on by themselves; letting go of the job ends them.

    One consumer asks for `response`, `response_async`, `chunks` or `chunks_async`; anyone may
    `close`. What goes wrong is raised as a SquallError.
    """

    kind: str
    whole: Callable[..., Whole]
    part: Callable[..., Part]

    def __init__(self, model: Model, request: Asked, id: str | None) -> None:
        self.id = id or f"{self.kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.request = request
        self._model = model
        self._mail: Mailbox[tuple[int, Piece]] = Mailbox()
        self._choices: list[_Choice] = []
        self._open = 0

    def submit(self, answers: Iterable[tuple[Request, _Choice]]) -> None:
        """Ask the engine for all of the answers, or for none if it refuses one."""
        try:
            for request, choice in answers:
                # The engine must not hold the job, or nobody could let go of it.
                sink = partial(_deliver, self._mail, len(self._choices))
                choice.answer = self._model.engine.submit(request, sink)
                self._choices.append(choice)
        except BaseException:
            self.close()
            raise
        self._open = len(self._choices)

    def response(self) -> Whole:
        with self:
            while self._open:
                self._take(*self._mail.get())
        return self._response()

    async def response_async(self) -> Whole:
        with self:
            while self._open:
                self._take(*await self._mail.get_async())
        return self._response()

    def chunks(self) -> Iterator[Part]:
        """Parts as they come; closing the iterator cancels the job."""
        with self:
            while self._open:
                yield from self._chunks(self._take(*self._mail.get()))
            if self.request.include_usage:
                yield self._chunk(usage=self.usage)

    async def chunks_async(self) -> AsyncIterator[Part]:
        with self:
            while self._open:
                for chunk in self._chunks(self._take(*await self._mail.get_async())):
                    yield chunk
            if self.request.include_usage:
                yield self._chunk(usage=self.usage)

    def close(self) -> None:
        """End all answers before their next token."""
        for choice in self._choices:
            choice.answer.cancel()

    @property
    def stopped(self) -> str:
        """The stop string that ended the first answer, if one did."""
        return self._choices[0].answer.stopped

    @property
    def usage(self) -> responses.Usage:
        """Tokens and seconds so far; a prompt counts once, however many answers it gets."""
        every = [choice.answer.usage for choice in self._choices]
        prompts = {c.prompt: c.answer.usage for c in reversed(self._choices)}.values()
        prompt = sum(usage.prompt_tokens for usage in prompts)
        cached = sum(usage.cached_tokens for usage in prompts)
        answer = sum(usage.answer_tokens for usage in every)
        prompt_s = max(usage.prompt_s for usage in every)
        answer_s = max(usage.answer_s for usage in every)
        whole_s = max(usage.queue_s + usage.running_s for usage in every)
        dropped = sum(usage.dropped_tokens for usage in prompts)
        accepted = sum(usage.accepted_tokens for usage in every)
        guessed = sum(usage.guessed_tokens for usage in every)
        return responses.Usage(
            completion_tokens=answer,
            prompt_tokens=prompt,
            total_tokens=prompt + answer,
            avg_tok_per_sec=_rate(prompt + answer, whole_s),
            avg_prompt_tok_per_sec=_rate(prompt - cached, prompt_s),
            avg_compl_tok_per_sec=_rate(answer, answer_s),
            total_time_sec=whole_s,
            total_prompt_time_sec=prompt_s,
            total_completion_time_sec=answer_s,
            prompt_tokens_details=responses.PromptTokensDetails(cached, dropped),
            completion_tokens_details=responses.CompletionTokensDetails(
                self._reasoning_tokens(), accepted, guessed - accepted
            ),
        )

    def _take(self, index: int, piece: Piece) -> int:
        self._open -= piece.finish_reason is not None
        if piece.error is not None:
            raise piece.error
        self._choices[index].take(piece)
        return index

    def _reasoning_tokens(self) -> int:
        return 0

    def _chunks(self, index: int) -> Iterator[Part]:
        for part in self._parts(index, self._choices[index]):
            yield self._chunk(part)

    def __del__(self) -> None:
        self.close()

    def _response(self) -> Whole:
        choices = tuple(self._whole_choices())
        return self.whole(self.id, choices, self.created, self.request.model, self.usage)

    def _chunk(self, *parts: Any, usage: responses.Usage | None = None) -> Part:
        return self.part(
            self.id, parts, self.created, self.request.model, usage,
            usage_follows=self.request.include_usage and usage is None,
        )  # fmt: skip

    @abstractmethod
    def _whole_choices(self) -> Iterator[Any]:
        """All answers, complete."""

    @abstractmethod
    def _parts(self, index: int, choice: _Choice) -> Iterator[Any]:
        """What is new of a choice; the finish_reason comes in the last."""


_Chat = Job[
    ChatCompletionRequest, responses.ChatCompletionResponse, responses.ChatCompletionChunkResponse
]


class ChatJob(_Chat):
    kind = "chatcmpl"
    whole = responses.ChatCompletionResponse
    part = responses.ChatCompletionChunkResponse

    def __init__(
        self, model: Model, request: ChatCompletionRequest, id: str | None, prompt: ChatPrompt
    ) -> None:
        super().__init__(model, request, id)
        names = [tool.name for tool in request.offer().callable]
        # Where there may be calls instead of a content, it may be null.
        self._empty = None if names else ""
        # Ids of calls are new also where a client gives many requests one id.
        self._said = [chats.ChatAnswer(prompt.parser(names), self._empty) for _ in range(request.n)]

    def _take(self, index: int, piece: Piece) -> int:
        super()._take(index, piece)
        said, choice = self._said[index], self._choices[index]
        said.take(piece)
        if choice.finish_reason == "stop" and said.called:
            choice.finish_reason = "tool_calls"
        return index

    def _reasoning_tokens(self) -> int:
        return sum(said.reasoning_tokens for said in self._said)

    def _whole_choices(self) -> Iterator[responses.Choice]:
        for index, choice in enumerate(self._choices):
            logprobs = self._logprobs(choice.tokens.entries)
            message = self._said[index].message
            yield responses.Choice(choice.finish_reason, index, message, logprobs)

    def _parts(self, index: int, choice: _Choice) -> Iterator[responses.ChunkChoice]:
        empty = responses.Delta(content=self._empty)
        if choice.is_first():
            yield responses.ChunkChoice(None, index, replace(empty, role="assistant"), None)
        news = choice.news()
        for delta in self._said[index].news or [empty] * bool(news):
            yield responses.ChunkChoice(None, index, delta, self._logprobs(news))
            news = []
        if choice.finish_reason is not None:
            yield responses.ChunkChoice(choice.finish_reason, index, empty, None)

    def _logprobs(self, entries: Sequence[Entry]) -> responses.Logprobs | None:
        return chat_logprobs(self._model.tokenizer, entries) if self.request.logprobs else None


class CompletionJob(
    Job[CompletionRequest, responses.CompletionResponse, responses.CompletionChunkResponse]
):
    """Completions of a text, or of several; those of each prompt are neighbours."""

    kind = "cmpl"
    whole = responses.CompletionResponse
    part = responses.CompletionChunkResponse

    def _whole_choices(self) -> Iterator[responses.CompletionChoice]:
        for index, choice in enumerate(self._best()):
            logprobs = self._logprobs(choice.tokens.entries)
            yield responses.CompletionChoice(choice.finish_reason, index, choice.text, logprobs)

    def _best(self) -> list[_Choice]:
        """The `n` best of each prompt's candidates."""
        best, candidates = self.request.n, self.request.candidates
        if best == candidates:
            return self._choices
        found = []
        for first in range(0, len(self._choices), candidates):
            group = self._choices[first : first + candidates]
            found += sorted(group, key=lambda choice: -choice.tokens.mean)[:best]
        return found

    def _parts(self, index: int, choice: _Choice) -> Iterator[responses.CompletionChoice]:
        text = choice.text if choice.is_first() else choice.new
        news = choice.news()
        if text or news:
            yield responses.CompletionChoice(None, index, text, self._logprobs(news))
        if choice.finish_reason is not None:
            yield responses.CompletionChoice(choice.finish_reason, index, "", None)

    def _logprobs(self, entries: Sequence[Entry]) -> responses.CompletionLogprobs | None:
        if self.request.logprobs is None:
            return None
        return completion_logprobs(self._model.tokenizer, entries)


def _request(
    model: Model, request: ChatCompletionRequest | CompletionRequest, prompt: Prompt, tenant: str
) -> Request:
    """What all answers to a prompt have in common."""
    asked_for, dry = request.arguments()
    sampling = Sampling(
        **DRAW | dict(model.defaults.values) | asked_for,
        logit_bias=request.logit_bias or {},
        dry=model.dry(**dry) if "multiplier" in dry else None,
        logits_processors=request.logits_processors,
    )
    structure, constraint = chats.structure(request, prompt), None
    if structure is not None:
        with naming(structure.field):
            constraint = model.constraint(structure.grammar, prompt)
    asked = model.request(
        prompt, sampling, stop=request.stops, stop_ids=request.stop_token_ids,
        constraint=constraint, adapters=request.adapters, truncate=request.truncate_sequence,
        tenant=tenant,
    )  # fmt: skip
    return replace(asked, ignore_eos=request.ignore_eos)


def _read(
    model: Model, request: CompletionRequest, prompt: str | Sequence[int]
) -> str | Sequence[int]:
    """The prompt, as ids if it asks for what is between two texts."""
    if not isinstance(prompt, str):
        return prompt
    if request.suffix is not None:
        return model.tokenizer.encode_fill(prompt, request.suffix)
    fills = model.tokenizer.asks_to_fill(prompt)
    return model.tokenizer.encode(prompt, specials=True) if fills else prompt


def _completion(
    model: Model, request: CompletionRequest, asked: Request, number: int
) -> tuple[Request, _Choice]:
    """A request of the engine for one answer to prompt `number`, and where the answer goes."""
    echoed, scores, scoring = "", None, None
    if request.echo:
        prompt = request.prompts[number]
        echoed = prompt if isinstance(prompt, str) else model.decode(asked.ids, skip_specials=True)
        if request.logprobs is not None:
            scores = PromptScores(asked.ids, request.logprobs)
            scoring = Scoring(scores.take)
        elif request.max_tokens == 0:
            scoring = Scoring(lambda *_: None, len(asked.ids) - 1)
    judged = 0 if request.candidates > request.n else None
    filling = model.tokenizer.filling
    fills = filling is not None and not filling.stops.isdisjoint(asked.ids)
    asked = replace(
        asked,
        stop_ids=asked.stop_ids | (filling.stops if filling and fills else frozenset()),
        max_tokens=request.max_tokens,
        logprobs=judged if request.logprobs is None else request.logprobs,
        scoring=scoring,
    )
    tokens = _tokens(model, asked, wanted=request.logprobs is not None)
    return asked, _Choice(number, tokens, echoed, scores)


def _tokens(model: Model, asked: Request, *, wanted: bool) -> Tokens:
    at_start = not asked.continues or (asked.scoring is not None and wanted)
    return Tokens(model.tokenizer, wanted=wanted, at_start=at_start, shown=asked.shown)


def _drawn_apart(asked: Request, count: int) -> Iterator[Request]:
    """The same request `count` times with seeds of their own; the first keeps its seed."""
    yield asked
    for choice in range(1, count):
        name = f"{asked.sampling.seed} {choice}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
        yield replace(asked, sampling=replace(asked.sampling, seed=seed))


def _check_count(model: Model, count: int) -> None:
    config = model.engine.config
    most = config.max_seqs + config.max_queue
    if count > most:
        raise InvalidRequest(f"these are {count} answers at a time; at most {most} are allowed")


def _deliver(mail: Mailbox[tuple[int, Piece]], index: int, piece: Piece) -> None:
    mail.put((index, piece))


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds else 0.0
