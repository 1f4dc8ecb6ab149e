"""What can be asked for, in OpenAI's terms and with mistral.rs's names; checked when it is made.

What needs a model, such as token ids and the ranges of sampling, is checked when a job starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import InitVar, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from squall.errors import InvalidRequest

if TYPE_CHECKING:
    from squall.engine.sampling import LogitsProcessor

MOST_CHOICES = 128
MOST_MESSAGES = 4096
MOST_PARTS = 1024
MOST_PROMPTS = 2048
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1024
MOST_STOP_IDS = 128
MOST_PROCESSORS = 16

Messages = str | Sequence[Mapping[str, Any]]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
NOT_YET = ("grammar", "grammar_type", "adapters", "tools", "tool_schemas", "suffix")
ROLES: dict[str, str] = {"developer": "system"}


ToolChoice = Enum("ToolChoice", "NoTools Auto")


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What chats and completions have in common.

    mistral.rs's names `n_choices` and `stop_seqs` stand for `n` and `stop`, and OpenAI's
    `max_completion_tokens` for `max_tokens`, by default what the context leaves.

    temperature, top_p: 1 unless given. `top_k` 0, -1 or None is off. Ranges: docs/sampling.md.
    seed: by default random. Choice 0 of several is what a single choice would be.
    min_tokens: nothing ends the answer before. ignore_eos: the model's end tokens never do.
    truncate_sequence: drop the beginning of a prompt that is too long instead of refusing it.
    user: not used.
    """

    model: str = "default"
    max_tokens: int | None = None
    n: int = 1
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: Sequence[str] | None = None
    dry_range: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    truncate_sequence: bool = False
    stream: bool = False
    stream_options: Mapping[str, bool] | None = None
    user: str | None = None
    grammar: str | None = None
    grammar_type: str | None = None
    response_format: Mapping[str, Any] | None = None
    adapters: Sequence[str] | None = None
    tool_schemas: Sequence[str] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: ToolChoice | str | Mapping[str, Any] | None = None
    max_completion_tokens: InitVar[int | None] = None
    n_choices: InitVar[int | None] = None
    stop_seqs: InitVar[str | Sequence[str] | None] = None

    def __post_init__(
        self,
        max_completion_tokens: int | None,
        n_choices: int | None,
        stop_seqs: str | Sequence[str] | None,
    ) -> None:
        self._accept("max_tokens", None, "max_completion_tokens", max_completion_tokens)
        self._accept("n", 1, "n_choices", n_choices)
        self._accept("stop", None, "stop_seqs", stop_seqs)
        self._check()

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a list, however it was given."""
        stop = self.stop
        return (stop,) if isinstance(stop, str) else tuple(stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    def _check(self) -> None:
        for name in NOT_YET:
            if getattr(self, name, None):
                raise InvalidRequest(f"{name} is not supported yet; leave it out")
        if self.tool_choice not in (None, "none", "auto", *ToolChoice):
            raise InvalidRequest("tool_choice is not supported yet, only none or auto")
        if (self.response_format or {"type": "text"}).get("type") != "text":
            raise InvalidRequest("response_format is not supported yet, only {'type': 'text'}")
        if not 1 <= self.n <= MOST_CHOICES:
            raise InvalidRequest(f"n is {self.n}; it must be between 1 and {MOST_CHOICES}")
        _short("stop", self.stops, MOST_STOPS)
        for text in self.stops:
            _short("a text in stop", text, MOST_STOP_CHARACTERS, "characters")
        _short("stop_token_ids", self.stop_token_ids, MOST_STOP_IDS)
        _short("logits_processors", self.logits_processors, MOST_PROCESSORS)

    def _accept(self, name: str, default: object, other: str, value: object) -> None:
        """`other` is one more name of the field `name`."""
        if value is None:
            return
        if getattr(self, name) not in (default, value):
            raise InvalidRequest(f"{name} and {other} say different things; give one of them")
        self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class ChatCompletionRequest(_Request):
    """The next message of a conversation.

    messages: of `role` and `content`, a text or a list of text parts; a text alone is a user's.
    logprobs, top_logprobs: tell each token's log-probability, and so many of the likeliest.
    """

    messages: Messages
    logprobs: bool = False
    top_logprobs: int | None = None

    def _check(self) -> None:
        super()._check()
        self._set("messages", tuple(_conversation(self.messages)))
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true")


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(_Request):
    """What comes after a text, or after each of several; token ids are as good as a text.

    best_of: make so many answers, and of those give the `n` with the highest mean log-probability.
    echo: begin with the prompt; mistral.rs's name is `echo_prompt`. With it, `max_tokens` may be 0.
    logprobs: tell each token's log-probability, and so many of the likeliest.
    suffix: not supported, as no model here has a template to fill in with.
    """

    prompt: Prompts
    best_of: int | None = None
    echo: bool = False
    suffix: str | None = None
    logprobs: int | None = None
    echo_prompt: InitVar[bool | None] = None

    def __post_init__(
        self,
        max_completion_tokens: int | None,
        n_choices: int | None,
        stop_seqs: str | Sequence[str] | None,
        echo_prompt: bool | None,
    ) -> None:
        self._accept("echo", False, "echo_prompt", echo_prompt)
        super().__post_init__(max_completion_tokens, n_choices, stop_seqs)

    @property
    def candidates(self) -> int:
        """How many answers are made to each prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def prompts(self) -> list[str | Sequence[int]]:
        """`prompt` as a list, however it was given."""
        given: Any = self.prompt
        alone = isinstance(given, str) or (len(given) and isinstance(given[0], int))
        return [given] if alone else list(given)

    def _check(self) -> None:
        super()._check()
        # mistral.rs has 1 as the default of best_of, also for several choices.
        if self.best_of == 1:
            self._set("best_of", None)
        if not self.n <= self.candidates <= MOST_CHOICES:
            raise InvalidRequest(
                f"best_of is {self.best_of}; it must be between n ({self.n}) and {MOST_CHOICES}"
            )
        if self.stream and self.candidates > self.n:
            raise InvalidRequest("best_of cannot be streamed; leave it out, or stream")
        if self.echo and self.logprobs is not None and self.truncate_sequence:
            raise InvalidRequest("echo with logprobs needs the whole prompt; no truncate_sequence")
        if not len(self.prompts):
            raise InvalidRequest("prompt is an empty list; give at least one text")
        _short("prompt", self.prompts, MOST_PROMPTS)


def _conversation(messages: Messages) -> list[dict[str, str]]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    _short("messages", messages, MOST_MESSAGES)
    if not len(messages):
        raise InvalidRequest("messages is empty; give at least one")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} must have a role and a content")
    for name in ("tool_calls", "tool_call_id", "function_call"):
        if message.get(name):
            raise InvalidRequest(f"{where}.{name} is not supported yet")
    role = str(message["role"])
    checked = {"role": ROLES.get(role, role), "content": _content(message, where)}
    called = message.get("name")
    return checked | ({"name": called} if isinstance(called, str) else {})


def _content(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{where}.content must be a text, or a list of text parts")
    _short(f"{where}.content", content, MOST_PARTS)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise InvalidRequest(
                f"{where}.content has a part of type {kind!r}; only 'text' is known"
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.content has a part of type 'text' without a text")
    return "".join(part["text"] for part in content)


def _short(name: str, values: Sized, most: int, what: str = "entries") -> None:
    if len(values) > most:
        raise InvalidRequest(f"{name} has {len(values)} {what}; at most {most} are allowed")
