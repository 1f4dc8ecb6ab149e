"""A chat's prompt, what its answers must look like, and an answer taken apart again."""

from __future__ import annotations

from squall.api.messages import characters
from squall.api.requests import ChatCompletionRequest
from squall.api.responses import CalledFunction, Delta, ResponseMessage, ToolCall, ToolCallDelta
from squall.api.structure import Structure, naming
from squall.engine.request import Constraint, Piece
from squall.errors import ContextLengthExceeded, InvalidRequest
from squall.model import Model
from squall.text.answer import (
    AnswerParser,
    CallArguments,
    CallBegun,
    CallEnded,
    Event,
    Reasoned,
    Said,
)
from squall.text.chat import ChatPrompt
from squall.text.grammar import Grammar

# More than texts have, so that what cannot fit is refused before it is read.
CHARACTERS_PER_TOKEN = 64


def chat_prompt(model: Model, request: ChatCompletionRequest) -> ChatPrompt:
    """The prompt of a chat, in the model's chat template."""
    messages = [dict(message) for message in request.messages if not isinstance(message, str)]
    check_characters(model, characters(messages))
    kwargs, tools = request.template_kwargs, request.offer().tools
    return model.chat_prompt(messages, tools=tools, template_kwargs=kwargs)


def check_characters(model: Model, count: int) -> None:
    """Raises ContextLengthExceeded for a prompt that is much too long."""
    if count > CHARACTERS_PER_TOKEN * model.context:
        raise ContextLengthExceeded(
            f"a prompt of {count} characters cannot fit the context of {model.context} tokens"
        )


def constraint_of(model: Model, structure: Structure | None, prompt: object) -> Constraint | None:
    """What its answers may be."""
    if structure is None:
        return None
    with naming(structure.field):
        return model.constraint(structure.grammar, prompt)


def chat_structure(request: ChatCompletionRequest, prompt: ChatPrompt) -> Structure | None:
    """What its answers must look like: whole calls of its tools, what was asked for, or either."""
    offer, structure = request.offer(), request.structure()
    if prompt.format is None:
        return structure
    parallel = not offer.sole if (said := request.parallel_tool_calls) is None else said
    required = offer.required or structure is not None
    calls = prompt.format.grammar(offer.callable, required=required, parallel=parallel)
    if structure is not None and not offer.required:
        calls = _either(calls, structure)
    return Structure("tools", calls)


def _either(calls: Grammar, structure: Structure) -> Grammar:
    """Calls, or an answer of JSON."""
    field, answer = structure
    if answer.kind not in ("json_schema", "json_object"):
        raise InvalidRequest(f"{field} must be JSON if there are tools; leave one of them out")
    schema = answer.value if answer.kind == "json_schema" else '{"type": "object"}'
    rules = calls.value.removeprefix("start:")
    return Grammar("lark", f"start: calls_ | answer_\nanswer_: %json {schema}\ncalls_: {rules}")


class ChatAnswer:
    """One answer taken apart, as far as it is known; `news` came with the last piece.

    empty: the content of deltas that have none.
    """

    def __init__(self, parser: AnswerParser, empty: str | None) -> None:
        self.reasoning_tokens = 0
        self.news: list[Delta] = []
        self._empty = empty
        self._parser = parser
        self._content = self._reasoning = ""
        self._calls: list[list[str]] = []  # id, name, arguments
        self._whole = 0
        self._pending = 0  # tokens of which it is not known yet whether they are reasoning

    @property
    def called(self) -> bool:
        """Whether there are calls, and all of them whole."""
        return len(self._calls) == self._whole > 0

    @property
    def message(self) -> ResponseMessage:
        """What has been said."""
        calls = tuple(ToolCall(id_, CalledFunction(*call)) for id_, *call in self._calls)
        content = self._content or self._empty
        return ResponseMessage(content, reasoning_content=self._reasoning, tool_calls=calls)

    def take(self, piece: Piece) -> None:
        """Go on with what the engine says."""
        self._pending += len(piece.ids)
        events = self._parser.push(piece.text, final=piece.finish_reason is not None)
        self.news = [delta for event in events if (delta := self._take(event)) is not None]

    def _take(self, event: Event) -> Delta | None:
        tokens, self._pending = self._pending, 0
        match event:
            case Reasoned(text):
                self.reasoning_tokens += tokens
                self._reasoning += text
                return Delta(content=self._empty, reasoning_content=text)
            case Said(text):
                self._content += text
                return Delta(content=text)
            case CallBegun(index, id_, name):
                self._calls.append([id_, name, ""])
                call = ToolCallDelta(index, CalledFunction(name), id_, "function")
            case CallArguments(index, text):
                self._calls[index][2] += text
                call = ToolCallDelta(index, CalledFunction(arguments=text))
            case CallEnded():
                self._whole += 1
                return None
        return Delta(content=self._empty, tool_calls=(call,))
