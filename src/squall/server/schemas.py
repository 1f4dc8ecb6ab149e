"""The HTTP bodies: OpenAI's names and types. Ranges are checked by `squall.api`."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from squall.api.messages import MOST_MESSAGES
from squall.api.requests import ChatCompletionRequest, CompletionRequest
from squall.api.structure import StructureFields
from squall.engine.sampling import SamplingFields
from squall.server.errors import TAG, ApiError

# Fields of OpenAI's and llama.cpp's that change nothing here.
HARMLESS = frozenset({
    "cache_prompt", "id_slot", "metadata", "prediction", "prompt_cache_key",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip
# Fields that would change the answer, with the values that do not. Others are passed on if the
# Python API knows the field, and refused if it does not: never silently without effect.
_EMPTY = (
    "allowed_token_ids", "bad_words", "documents", "functions", "images",
    "logits_processors",
)  # fmt: skip
_NEVER = (
    "audio", "chat_template", "prompt_logprobs", "structural_tag", "web_search_options",
)  # fmt: skip
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(_EMPTY, ([],)),
    **dict.fromkeys(_NEVER, ()),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
MOST_ITEMS = 100_000  # of any list, before anything is done with it

_BodyT = TypeVar("_BodyT", bound="Body")


def _shape(value: object) -> str:
    """Which member of a union is meant, so that an error is about that one only."""
    return TAG + ("list" if isinstance(value, list) else type(value).__name__)


def _prompt_shape(value: object) -> str:
    first = value[0] if isinstance(value, list) and value else 0
    return _shape(value) + (type(first).__name__ if isinstance(value, list) else "")


_WRONG = {"custom_error_type": "type", "custom_error_message": "has the wrong type"}
_FEW = Field(max_length=MOST_ITEMS)
_MESSAGES = Field(max_length=MOST_MESSAGES)
Text = Annotated[str, Tag("~str")]
_Texts = Annotated[list[str], _FEW, Tag("~list")]
Texts = Annotated[Text | _Texts, Discriminator(_shape, **_WRONG)]
Chosen = Annotated[Text | Annotated[dict[str, Any], Tag("~dict")], Discriminator(_shape, **_WRONG)]
_Weights = Annotated[dict[str, float], _FEW, Tag("~dict")]
Adapters = Annotated[Text | _Texts | _Weights, Discriminator(_shape, **_WRONG)]
Prompts = Annotated[
    Text
    | Annotated[list[int], Field(max_length=10 * MOST_ITEMS), Tag("~listint")]
    | Annotated[list[str], _FEW, Tag("~liststr")]
    | Annotated[list[list[int]], _FEW, Tag("~listlist")],
    Discriminator(_prompt_shape, **_WRONG),
]

Path_ = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
Parts = Annotated[
    Text | Annotated[list[dict[str, Any]], _FEW, Tag("~list")], Discriminator(_shape, **_WRONG)
]


class Body(BaseModel, frozen=True):
    """What all bodies have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None

    @classmethod
    def parse(cls: type[_BodyT], data: bytes) -> _BodyT:
        """A body from its JSON. Raises ValidationError, and ApiError for what is not supported."""
        body = cls.model_validate_json(data.removeprefix(codecs.BOM_UTF8))
        goes_on = getattr(body, "continue_final_message", None)
        for name, value in (body.model_extra or {}).items():
            if name not in NEUTRAL or value is None:
                continue
            if goes_on and name == "add_generation_prompt":  # of a new message
                continue
            if value not in NEUTRAL[name]:
                raise ApiError(
                    400, f"{name} is not supported by this server", "unsupported_parameter",
                    param=name,
                )  # fmt: skip
        return body

    @property
    def ignored(self) -> list[str]:
        """The fields that nobody knows."""
        return [name for name in self.model_extra or () if name not in HARMLESS | NEUTRAL.keys()]

    def given(self) -> dict[str, Any]:
        """The fields that say something, as arguments for the Python API."""
        return self.model_dump(exclude_none=True, exclude={"model", *(self.model_extra or ())})


class StreamOptions(BaseModel):
    """What a stream has beside its pieces. Obfuscation is accepted, and not done."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Message(BaseModel):
    """One message. What else it has goes to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Parts | None = None


Conversation = Annotated[
    Text | Annotated[list[Message], _MESSAGES, Tag("~list")], Discriminator(_shape, **_WRONG)
]


class GenerationBody(Body, StructureFields, SamplingFields, frozen=True):
    """How an answer is made; docs/sampling.md tells what the numbers do."""

    asks: ClassVar[type[ChatCompletionRequest | CompletionRequest]]

    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Texts | None = None
    logit_bias: dict[int, float] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], _FEW] | None = None
    response_format: dict[str, Any] | None = None
    grammar: Chosen | None = None
    tools: Annotated[list[dict[str, Any]], _FEW] | None = None
    tool_choice: Chosen | None = None
    adapters: Adapters | None = None

    def request(self, **defaults: Any) -> ChatCompletionRequest | CompletionRequest:
        """The same for the Python API, which checks the ranges."""
        return self.asks(**{**defaults, **self.given()})


class ChatBody(GenerationBody, frozen=True):
    """POST /v1/chat/completions."""

    asks = ChatCompletionRequest

    messages: Conversation
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody, frozen=True):
    """POST /v1/completions. A prompt is text, token ids, or a list of either."""

    asks = CompletionRequest

    prompt: Prompts
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None

    def given(self) -> dict[str, Any]:
        """See `Body`. Clients send an empty suffix where there is none."""
        found = super().given()
        return found if self.suffix else {k: v for k, v in found.items() if k != "suffix"}


class TokenizeBody(Body, frozen=True):
    """POST /tokenize: the ids of a text, or of a conversation as a chat would have them."""

    prompt: str | None = None
    messages: Conversation | None = None
    tools: Annotated[list[dict[str, Any]], _FEW] | None = None
    tool_choice: Chosen | None = None
    reasoning_effort: str | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class ReIsqBody(Body, frozen=True):
    """POST /re_isq: other weights, of a type that --isq knows."""

    ggml_type: Annotated[str, Field(max_length=40)]


class ActivateBody(Body, frozen=True):
    """POST /activate_adapters: for requests that name none."""

    adapter_names: Annotated[list[str], _FEW]


class AdapterBody(Body, frozen=True):
    """POST /v1/adapters: load one, or replace it; what is pinned stays in memory."""

    name: str
    path: Path_
    pinned: bool = False


class LoadBody(Body, frozen=True):
    """POST /v1/load_lora_adapter, vLLM's; load_inplace: replace it if it is there."""

    lora_name: str
    lora_path: Path_
    load_inplace: bool = False


class UnloadBody(Body, frozen=True):
    """POST /v1/unload_lora_adapter, vLLM's."""

    lora_name: str


class DetokenizeBody(Body, frozen=True):
    """POST /detokenize: the text of token ids."""

    tokens: Annotated[list[int], Field(max_length=10 * MOST_ITEMS)]
