"""What can be asked for, in OpenAI's terms and with mistral.rs's names; checked when it is made.

What needs a model, such as token ids and the ranges of sampling, is checked when a job starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from functools import wraps
from typing import Any, ClassVar, TypeVar

from squall.adapters.shelf import Adapters, weights_of
from squall.api.messages import Messages, check_short, conversation
from squall.api.structure import StructureFields
from squall.api.tool_choice import Offer, ToolChoice, offer
from squall.engine.fields import check, check_fields, check_texts, numbers_of, whole
from squall.engine.sampling import MOST_TOP_LOGPROBS, LogitsProcessor, SamplingFields
from squall.errors import InvalidRequest
from squall.text.chat import RESERVED

MOST_CHOICES = 128
MOST_PROMPTS = 2048
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1024
MOST_STOP_IDS = 128
MOST_PROCESSORS = 16
MOST_TEMPLATE_KWARGS = 16_384  # characters, as JSON

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# (field, a value that others allow, what it means): a top_p of 0 leaves the likeliest token.
OFF = (("top_p", 0, 1e-9), ("top_k", -1, 0))
# The last arguments of both kinds, in mistral.rs's order.
_LAST = (
    "grammar grammar_type adapters min_p tool_schemas tool_choice dry_multiplier dry_base "
    "dry_allowed_length dry_sequence_breakers"
)

_Kind = TypeVar("_Kind")


def _ordered(names: str) -> Callable[[type[_Kind]], type[_Kind]]:
    """Arguments may come without names too, in this order."""
    order = names.split()

    def decorate(kind: type[_Kind]) -> type[_Kind]:
        init = kind.__init__

        @wraps(init)
        def ordered(self: _Kind, *values: object, **named: object) -> None:
            if len(values) > len(order):
                raise TypeError(f"{kind.__name__}: at most {len(order)} arguments without names")
            init(self, **dict(zip(order, values, strict=False)), **named)

        kind.__init__ = ordered  # type: ignore[assignment,method-assign]
        return kind

    return decorate


@dataclass(frozen=True, kw_only=True)
class _Request(StructureFields, SamplingFields):
    """What chats and completions have in common.

    mistral.rs's names `n_choices` and `stop_seqs` stand for `n` and `stop`, and OpenAI's
    `max_completion_tokens` for `max_tokens`, by default what the context leaves.

    temperature, top_p: 1 unless given. `top_k` 0, -1 or None is off. Ranges: docs/sampling.md.
    seed: by default random. Choice 0 of several is what a single choice would be.
    min_tokens: nothing ends the answer before. ignore_eos: the model's end tokens never do.
    adapters: of the model, by name, a list or with weights; None: those that are active, []: none.
    truncate_sequence: drop the beginning of a prompt that is too long instead of refusing it.
    user: not used.
    """

    model: str = "default"
    max_tokens: int | None = whole("At most so many tokens.")
    n: int = whole("So many answers.", default=1, least=1, most=MOST_CHOICES)
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    logit_bias: Mapping[int, float] | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    ignore_eos: bool = False
    truncate_sequence: bool = False
    stream: bool = False
    stream_options: Mapping[str, bool] | None = None
    user: str | None = None
    adapters: Adapters | None = None
    tool_schemas: Sequence[str] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: ToolChoice | str | Mapping[str, Any] | None = None
    max_completion_tokens: InitVar[int | None] = None
    n_choices: InitVar[int | None] = None
    stop_seqs: InitVar[str | Sequence[str] | None] = None

    # Fields with the other name that each has; in the order of the `InitVar`s.
    _names: ClassVar[Mapping[str, str]] = {
        "max_tokens": "max_completion_tokens", "n": "n_choices", "stop": "stop_seqs"
    }  # fmt: skip

    def __post_init__(self, *others: Any) -> None:
        for (name, other), value in zip(self._names.items(), others, strict=True):
            self._accept(name, other, value)
        for name, off, least in OFF:
            value = getattr(self, name)
            if value == off and not isinstance(value, bool):
                self._set(name, least)
        self._check()

    @property
    def stops(self) -> tuple[str, ...]:
        stop = self.stop
        check(isinstance(stop, str | Sequence | None), "stop", stop, "a text or a list of texts")
        return (stop,) if isinstance(stop, str) else tuple(stop or ())

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def _check(self) -> None:
        check_fields(self)
        check_texts("stop", self.stops)
        check_short("stop", self.stops, MOST_STOPS)
        for text in self.stops:
            check_short("a text in stop", text, MOST_STOP_CHARACTERS, "characters")
        lists = {"stop_token_ids": MOST_STOP_IDS, "logits_processors": MOST_PROCESSORS}
        for name, most in lists.items():
            values = getattr(self, name)
            check(isinstance(values, Sequence), name, values, "a list")
            check_short(name, values, most)
        if self.adapters is not None:
            weights_of(self.adapters)
        self.structure()

    def _accept(self, name: str, other: str, value: object) -> None:
        """`other` is one more name of the field `name`."""
        if value is None:
            return
        if getattr(self, name) not in (self.__dataclass_fields__[name].default, value):
            raise InvalidRequest(f"{name} and {other} say different things; give one of them")
        self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@_ordered(
    "messages model logprobs n_choices logit_bias top_logprobs max_tokens presence_penalty "
    f"frequency_penalty stop_seqs temperature top_p top_k stream {_LAST}"
)
@dataclass(frozen=True, kw_only=True)
class ChatCompletionRequest(_Request):
    """The next message of a conversation.

    messages: of `role` and `content`, a text or texts and images; a text alone is a user's.
    tools: what the model may call, in OpenAI's shape; `tool_schemas`: the same, each as JSON.
    tool_choice: "none", "auto", "required", a function, or allowed_tools; or a ToolChoice.
    parallel_tool_calls: whether an answer may have several calls.
    reasoning_effort: how long to think, for templates that know it; "none" is not at all.
    logprobs, top_logprobs: tell each token's log-probability, and so many of the likeliest.
    continue_final_message: go on with the text of the last message, which is the assistant's.
    chat_template_kwargs: more variables for the chat template, such as `enable_thinking`.
    """

    messages: Messages
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    logprobs: bool = False
    top_logprobs: int | None = whole("Of so many of the likeliest.", most=MOST_TOP_LOGPROBS)
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None

    def offer(self) -> Offer:
        return offer(self.tools, self.tool_schemas, self.tool_choice, self.parallel_tool_calls)

    @property
    def template_kwargs(self) -> Mapping[str, Any]:
        effort = self.reasoning_effort
        said = {} if effort is None else {"reasoning_effort": effort}
        thinks = {"enable_thinking": False} if effort == "none" else {}
        return said | thinks | dict(self.chat_template_kwargs or {})

    def _check(self) -> None:
        super()._check()
        self._set("messages", tuple(conversation(self.messages)))
        self.offer()
        last: Any = self.messages[-1]
        if self.continue_final_message and (last["role"] != "assistant" or "tool_calls" in last):
            needed = "a last message of the assistant's, without calls"
            raise InvalidRequest(f"continue_final_message needs {needed}")
        right = self.reasoning_effort in (None, *EFFORTS)
        check(right, "reasoning_effort", self.reasoning_effort, f"one of {', '.join(EFFORTS)}")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true")
        given = self.chat_template_kwargs
        if given is not None:
            _check_template_kwargs(given)


@_ordered(
    "prompt model best_of echo_prompt presence_penalty frequency_penalty logit_bias max_tokens "
    f"n_choices stop_seqs temperature top_p suffix top_k {_LAST}"
)
@dataclass(frozen=True, kw_only=True)
class CompletionRequest(_Request):
    """What comes after a text, or after each of several; token ids are as good as a text.

    best_of: make so many answers, and of those give the `n` with the highest mean log-probability.
    echo: begin with the prompt; mistral.rs's name is `echo_prompt`. With it, `max_tokens` may be 0.
    logprobs: tell each token's log-probability, and so many of the likeliest.
    suffix: what comes after the answer, for models that can fill in; such prompts are never cut.
    """

    prompt: Prompts
    best_of: int | None = whole("Of so many answers the `n` best.")
    echo: bool = False
    suffix: str | None = None
    logprobs: int | None = whole("Of so many of the likeliest.", most=MOST_TOP_LOGPROBS)
    echo_prompt: InitVar[bool | None] = None

    _names: ClassVar[Mapping[str, str]] = {**_Request._names, "echo": "echo_prompt"}

    @property
    def candidates(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def prompts(self) -> list[str | Sequence[int]]:
        given: Any = self.prompt
        alone = isinstance(given, str) or (len(given) and isinstance(given[0], int))
        return [given] if alone else list(given)

    def _check(self) -> None:
        super()._check()
        if self.suffix is not None:
            self._check_suffix()
        if self.tools or self.tool_schemas:
            name = "tools" if self.tools else "tool_schemas"
            raise InvalidRequest(f"{name} is for chats, not for completions; leave it out")
        offer((), (), self.tool_choice)
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
        check_short("prompt", self.prompts, MOST_PROMPTS)

    def _check_suffix(self) -> None:
        check(isinstance(self.suffix, str), "suffix", self.suffix, "a text")
        if self.echo or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise InvalidRequest("suffix needs prompts that are texts, and no echo")
        self._set("truncate_sequence", False)


def _check_template_kwargs(given: Mapping[str, Any]) -> None:
    name = "chat_template_kwargs"
    right = isinstance(given, Mapping) and all(isinstance(key, str) for key in given)
    check(right, name, given, "an object")
    refused = sorted((RESERVED | {"documents"}) & given.keys())
    if refused:
        raise InvalidRequest(f"{name} has {refused[0]!r}, which is not for it; leave it out")
    try:
        size = len(json.dumps(given))
    except (TypeError, ValueError, RecursionError):
        raise InvalidRequest(f"{name} must be an object as JSON has them") from None
    if size > MOST_TEMPLATE_KWARGS:
        raise InvalidRequest(
            f"{name} has {size} characters; at most {MOST_TEMPLATE_KWARGS} are allowed"
        )


NUMBERS = numbers_of(ChatCompletionRequest) | numbers_of(CompletionRequest)
