"""A chat's prompt, what its answers must look like, and an answer taken apart again."""

from __future__ import annotations

import json
from itertools import groupby
from operator import attrgetter

from squall.api.messages import Content
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.api.responses import CalledFunction, Delta, ResponseMessage, ToolCall, ToolCallDelta
from squall.api.structure import Structure
from squall.engine.request import Piece
from squall.errors import ContextLengthExceeded, InvalidRequest
from squall.model import Model, Prompt
from squall.text import answer
from squall.text.chat import ChatPrompt
from squall.text.grammar import Grammar

# More than texts have, so that what cannot fit is refused before it is read.
CHARACTERS_PER_TOKEN = 64


def chat_prompt(model: Model, request: ChatCompletionRequest) -> ChatPrompt:
    messages = [dict(message) for message in request.messages if not isinstance(message, str)]
    # Images are counted when they are read.
    texts = [{**message, "content": _texts(message["content"])} for message in messages]
    check_characters(model, len(json.dumps(texts, ensure_ascii=False)))
    kwargs, tools = request.template_kwargs, request.offer().tools
    continues = request.continue_final_message
    return model.chat_prompt(messages, tools=tools, template_kwargs=kwargs, continues=continues)


def _texts(content: Content) -> Content | list[str]:
    """A content without its images, which are counted once they are read."""
    return content if isinstance(content, str) else [part.get("text", "") for part in content]


def check_characters(model: Model, count: int) -> None:
    """Raises ContextLengthExceeded for a prompt that is much too long."""
    if count > CHARACTERS_PER_TOKEN * model.context:
        raise ContextLengthExceeded(
            f"a prompt of {count} characters cannot fit the context of {model.context} tokens"
        )


def structure(
    request: ChatCompletionRequest | CompletionRequest, prompt: Prompt
) -> Structure | None:
    """What its answers must look like: whole calls of its tools, what was asked for, or either."""
    asked = request.structure()
    if isinstance(request, CompletionRequest) or not isinstance(prompt, ChatPrompt):
        return asked
    if (form := prompt.format) is None:
        return asked
    offer = request.offer()
    required = offer.required or asked is not None
    calls = form.grammar(
        offer.callable, required=required, parallel=offer.parallel, reasoning=prompt.reasoning
    )
    if asked is None or offer.required:
        return Structure("tools", calls)
    field, shape = asked
    if shape.kind not in ("json_schema", "json_object"):
        raise InvalidRequest(f"{field} must be JSON if there are tools; leave one of them out")
    json_ = shape.value or '{"type": "object"}'
    rules = calls.value.removeprefix("start:")
    either = f"start: calls_ | answer_\nanswer_: %json {json_}\ncalls_: {rules}"
    return Structure(field, Grammar("lark", either))


class ChatAnswer:
    """One answer taken apart, as deltas; `news` came with the last piece.

    empty: the content of deltas that have none.
    """

    def __init__(self, parser: answer.AnswerParser, empty: str | None) -> None:
        self.reasoning_tokens = 0
        self.news: list[Delta] = []
        self.called = False  # and the last call is whole
        self._deltas: list[Delta] = []
        self._empty = empty
        self._parser = parser
        self._pending = 0  # tokens of which it is not known yet whether they are reasoning

    @property
    def message(self) -> ResponseMessage:
        made = (call for delta in self._deltas for call in delta.tool_calls)
        calls: tuple[ToolCall, ...] = ()
        for _, (first, *rest) in groupby(made, attrgetter("index")):
            text = "".join(call.function.arguments for call in rest)
            calls += (ToolCall(first.id or "", CalledFunction(first.function.name, text)),)
        content = "".join(delta.content or "" for delta in self._deltas)
        reasoning = "".join(delta.reasoning_content for delta in self._deltas)
        return ResponseMessage(
            content or self._empty, reasoning_content=reasoning, tool_calls=calls
        )

    def take(self, piece: Piece) -> None:
        self._pending += len(piece.ids)
        self.news = []
        for event in self._parser.push(piece.text, final=piece.finish_reason is not None):
            if isinstance(event, answer.Reasoned):
                self.reasoning_tokens += self._pending
            self._pending = 0
            self.called = isinstance(event, answer.CallEnded) or (
                self.called and isinstance(event, answer.Said)
            )
            if not isinstance(event, answer.CallEnded):
                self.news.append(_delta(event, self._empty))
        self._deltas += self.news


def _delta(
    event: answer.Reasoned | answer.Said | answer.CallBegun | answer.CallArguments,
    empty: str | None,
) -> Delta:
    match event:
        case answer.Said(text):
            return Delta(content=text)
        case answer.Reasoned(text):
            return Delta(content=empty, reasoning_content=text)
        case answer.CallBegun(index, id_, name):
            call = ToolCallDelta(index, CalledFunction(name), id_, "function")
        case answer.CallArguments(index, text):
            call = ToolCallDelta(index, CalledFunction(arguments=text))
    return Delta(content=empty, tool_calls=(call,))
