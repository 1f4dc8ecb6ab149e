"""What is answered, in OpenAI's shapes. `to_dict` and `to_json` give what goes over the wire."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

FINGERPRINT = "local"
OMIT = {"omit": True}


@dataclass(frozen=True, slots=True)
class Shape:
    """Turns a dataclass into plain data; fields marked `OMIT` are left out when they are empty."""

    def to_dict(self) -> dict[str, Any]:
        return {
            f.name: _plain(value)
            for f in fields(self)
            if (value := getattr(self, f.name)) or not f.metadata
        }

    def to_json(self) -> str:
        """As JSON in one line of ASCII."""
        return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Shape):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class PromptTokensDetails(Shape):
    """cached_tokens did not have to be computed; dropped_tokens were cut off the beginning."""

    cached_tokens: int = 0
    dropped_tokens: int = field(default=0, metadata=OMIT)


@dataclass(frozen=True, slots=True)
class CompletionTokensDetails(Shape):
    """reasoning_tokens are the answer's too; of the guessed ones some were right, others not."""

    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage(Shape):
    """Tokens, seconds and tokens a second of all choices together.

    The time of the prompt is that until its first token, without waiting in the queue; the rate
    counts the tokens that were computed. With several choices the slowest one's times are told.
    """

    completion_tokens: int
    prompt_tokens: int
    total_tokens: int
    avg_tok_per_sec: float
    avg_prompt_tok_per_sec: float
    avg_compl_tok_per_sec: float
    total_time_sec: float
    total_prompt_time_sec: float
    total_completion_time_sec: float
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()

    def __add__(self, later: Usage) -> Usage:
        """Of two answers one after the other, with the later one's rates."""
        names = [f.name for f in fields(self) if f.name.startswith("avg_")]
        both: Usage = _added(self, later)
        return replace(both, **{name: getattr(later, name) for name in names})


def _added(one: Any, other: Any) -> Any:
    if not isinstance(one, Shape):
        return one + other
    pairs = ((getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return type(one)(*(_added(*pair) for pair in pairs))


@dataclass(frozen=True, slots=True)
class TopLogprob(Shape):
    """A token that was likely; `bytes` are right also where they are no whole characters."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResponseLogprob(TopLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Logprobs(Shape):
    """Natural log-probabilities of a chat's tokens."""

    content: tuple[ResponseLogprob, ...]


@dataclass(frozen=True, slots=True)
class CompletionLogprobs(Shape):
    """Natural log-probabilities of a completion's tokens, one entry a token in each list.

    text_offset: the character of the choice's text at which a token begins. The first token of a
    prompt has no log-probability.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...]
    text_offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CalledFunction(Shape):
    """The name comes once; arguments are JSON, in a stream a part of it."""

    name: str = field(default="", metadata=OMIT)
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall(Shape):
    """A tool that is to be called; its result comes back with the id."""

    id: str
    function: CalledFunction
    type: str = "function"


@dataclass(frozen=True, slots=True)
class ToolCallDelta(Shape):
    """What is new of a call, which is told by its index; `id` and `type` come first, and once."""

    index: int
    function: CalledFunction
    id: str | None = field(default=None, metadata=OMIT)
    type: str | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True, slots=True)
class ResponseMessage(Shape):
    """What the assistant says; there is no content where it only calls tools."""

    content: str | None
    role: str = "assistant"
    reasoning_content: str = field(default="", metadata=OMIT)
    tool_calls: tuple[ToolCall, ...] = field(default=(), metadata=OMIT)


@dataclass(frozen=True, slots=True)
class Choice(Shape):
    """One answer; finish_reason is "stop", "tool_calls", "length" or "canceled"."""

    finish_reason: str | None
    index: int
    message: ResponseMessage
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class CompletionChoice(Shape):
    """One completion, or a part of one; finish_reason is "stop", "length" or "canceled"."""

    finish_reason: str | None
    index: int
    text: str
    logprobs: CompletionLogprobs | None


@dataclass(frozen=True, slots=True)
class Delta(Shape):
    """What is new; `role` comes first, and once.

    Clients add up contents without looking, unless they have given tools; then there may be none.
    """

    role: str | None = field(default=None, metadata=OMIT)
    content: str | None = ""
    reasoning_content: str = field(default="", metadata=OMIT)
    tool_calls: tuple[ToolCallDelta, ...] = field(default=(), metadata=OMIT)


@dataclass(frozen=True, slots=True)
class ChunkChoice(Shape):
    """News of one answer; the last has the finish_reason."""

    finish_reason: str | None
    index: int
    delta: Delta
    logprobs: Logprobs | None


_Choice = TypeVar("_Choice")


@dataclass(frozen=True, slots=True)
class _Whole(Shape, Generic[_Choice]):
    id: str
    choices: tuple[_Choice, ...]
    created: int
    model: str
    usage: Usage
    object: str = ""
    system_fingerprint: str = FINGERPRINT


@dataclass(frozen=True, slots=True)
class _Chunk(Shape, Generic[_Choice]):
    """Where the usage is to come, JSON says that it is not there yet."""

    id: str
    choices: tuple[_Choice, ...]
    created: int
    model: str
    usage: Usage | None = field(default=None, metadata=OMIT)
    object: str = ""
    system_fingerprint: str = FINGERPRINT
    usage_follows: bool = field(default=False, metadata=OMIT)

    def to_dict(self) -> dict[str, Any]:
        found = Shape.to_dict(self)
        return found | {"usage": None} if found.pop("usage_follows", False) else found


@dataclass(frozen=True, slots=True)
class ChatCompletionResponse(_Whole[Choice]):
    """squall_tools: the calls that a server has made itself, with their results."""

    object: str = "chat.completion"
    squall_tools: tuple[dict[str, str], ...] = field(default=(), metadata=OMIT)


@dataclass(frozen=True, slots=True)
class ChatCompletionChunkResponse(_Chunk[ChunkChoice]):
    """A part of a chat's answers; the one with the usage has no choices."""

    object: str = "chat.completion.chunk"
    squall_tools: tuple[dict[str, str], ...] = field(default=(), metadata=OMIT)


@dataclass(frozen=True, slots=True)
class CompletionResponse(_Whole[CompletionChoice]):
    object: str = "text_completion"


@dataclass(frozen=True, slots=True)
class CompletionChunkResponse(_Chunk[CompletionChoice]):
    object: str = "text_completion"


@dataclass(frozen=True, slots=True)
class ImageChoice(Shape):
    """A picture: the path of its file, or a data URI. notes: what its maker was not told."""

    seed: int
    url: str | None = field(default=None, metadata=OMIT)
    b64_json: str | None = field(default=None, metadata=OMIT)
    notes: tuple[str, ...] = field(default=(), metadata=OMIT)


@dataclass(frozen=True, slots=True)
class ImageGenerationResponse(Shape):
    created: int
    data: tuple[ImageChoice, ...]

    @property
    def choices(self) -> tuple[ImageChoice, ...]:
        """`data`, as mistral.rs's example of FLUX has it."""
        return self.data
