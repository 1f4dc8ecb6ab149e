"""What a request refuses, before there is a model."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from squall import ChatCompletionRequest, CompletionRequest, InvalidRequest, ToolChoice
from squall.api.messages import MOST_MESSAGES
from squall.api.requests import MOST_CHOICES, MOST_PROMPTS, MOST_STOPS

HI = {"role": "user", "content": "Hi"}
MILLION = 10**6


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(**{"messages": [HI], **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"prompt": "Hi", **fields})


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 0}, "n"),
        ({"n": MOST_CHOICES + 1}, "n"),
        ({"n_choices": MILLION}, "n"),
        ({"n": 2, "n_choices": 3}, "n_choices"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"stop": "a", "stop_seqs": "b"}, "stop_seqs"),
        ({"stop": ["x"] * (MOST_STOPS + 1)}, "stop"),
        ({"stop": "x" * MILLION}, "stop"),
        ({"stop_token_ids": range(MILLION)}, "stop_token_ids"),
        ({"logits_processors": [print] * MILLION}, "logits_processors"),
        ({"grammar": "a+"}, "grammar"),
        ({"grammar_type": "regex"}, "grammar_type"),
        ({"adapters": ["mine", 5]}, "adapters"),
        ({"adapters": {"mine": "much"}}, "adapters"),
        ({"adapters": {str(i): 1 for i in range(MILLION)}}, "adapters"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_schemas": ["{}"]}, "tool_schemas"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": 2.0}, "n"),
        ({"n": None}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"top_k": 2.5}, "top_k"),
        ({"temperature": "a"}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": False}, "top_p"),
        ({"min_tokens": []}, "min_tokens"),
        ({"dry_range": 0}, "dry_range"),
        ({"dry_sequence_breakers": "a"}, "dry_sequence_breakers"),
        ({"dry_sequence_breakers": [1]}, "dry_sequence_breakers"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"logits_processors": 5}, "logits_processors"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_refused(make: Any, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"\b{named}\b"):
        make(**fields)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages"),
        ([HI] * (MOST_MESSAGES + 1), "messages"),
        (["Hi"], r"messages\[0\]"),
        ([HI, {"content": "Hi"}], r"messages\[1\]"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": 7}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}] * MILLION}], "content"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "tool_calls"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "content"),
        ([{"role": "assistant", "content": None, "refusal": 5}], "content"),
    ],
)
def test_refused_messages(messages: Any, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        chat(messages=messages)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * (MOST_PROMPTS + 1)}, "prompt"),
        ({"best_of": MILLION}, "best_of"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"suffix": ".", "echo": True}, "suffix"),
        ({"suffix": ".", "prompt": [1]}, "suffix"),
        ({"echo": True, "logprobs": 0, "truncate_sequence": True}, "echo"),
    ],
)
def test_refused_completions(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        completion(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": 1.0},
        {"logprobs": 1},
    ],
)
def test_wrong_logprobs(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="logprobs"):
        chat(**fields)
    assert chat(logprobs=False, top_logprobs=0).top_logprobs == 0


@pytest.mark.parametrize(
    "kwargs", [5, {"messages": []}, {"tokenize": True}, {1: 2}, {"x": print}, {"x": "y" * 20_000}]
)
def test_refused_template_kwargs(kwargs: Any) -> None:
    with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
        chat(chat_template_kwargs=kwargs)


def test_names_of_both_apis() -> None:
    theirs = completion(n_choices=2, stop_seqs=["."], echo_prompt=True, best_of=1)
    assert theirs == completion(n=2, stop=["."], echo=True)
    assert theirs.candidates == 2
    assert chat(max_completion_tokens=3).max_tokens == 3
    assert chat(tool_choice=ToolChoice.NoTools, tools=[], adapters=[]).tool_choice


def test_the_order_is_mistral_rs_s() -> None:
    shape, dry = {"type": "regex", "value": "a+"}, (0.5, 1.5, 3, ("\n",))
    sampled: dict[str, Any] = {
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "logit_bias": {1: 2.0}, "max_tokens": 9,
        "temperature": 0.3, "top_p": 0.4, "top_k": 5, "min_p": 0.1, "grammar": shape,
        "dry_multiplier": 0.5, "dry_base": 1.5, "dry_allowed_length": 3,
        "dry_sequence_breakers": ("\n",),
    }  # fmt: skip
    given: Any = (
        [HI], "m", True, 2, {1: 2.0}, 3, 9, 0.1, 0.2, ["x"], 0.3, 0.4, 5, True, shape, None, ["a"],
        0.1, None, ToolChoice.Auto, *dry,
    )  # fmt: skip
    assert ChatCompletionRequest(*given) == chat(
        model="m", logprobs=True, n=2, top_logprobs=3, stop=["x"], stream=True, adapters=["a"],
        tool_choice=ToolChoice.Auto, **sampled,
    )  # fmt: skip
    given = (
        "Hi", "m", 2, True, 0.1, 0.2, {1: 2.0}, 9, 2, ["x"], 0.3, 0.4, None, 5, shape, None, None,
        0.1, None, None, *dry,
    )  # fmt: skip
    assert CompletionRequest(*given) == completion(
        model="m", best_of=2, echo=True, n=2, stop=["x"], **sampled
    )
    with pytest.raises(TypeError, match="at most 24 arguments without names"):
        CompletionRequest(*given, None)
    with pytest.raises(TypeError, match="model"):
        CompletionRequest("Hi", "m", model="n")


def test_messages_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [{"role": "developer", "content": "Be."}, {"role": "user", "content": parts}]
    expected = ({"role": "system", "content": "Be."}, {"role": "user", "content": "ab"})
    assert chat(messages=given).messages == expected
    assert chat(messages="Hi").messages == (HI,)
    refusals = [
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    expected = {"role": "assistant", "content": "No."}
    assert chat(messages=refusals).messages == (expected, expected)
    assert chat(messages=[{"role": "assistant"}]).messages == (
        {"role": "assistant", "content": ""},
    )


def test_prompts_are_read() -> None:
    assert completion(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion(prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]
    assert completion(prompt=["a", "b"]).prompts == ["a", "b"]


_WORDS = (
    "type function name json_schema schema text json_object regex value choice a+ tools mode auto "
    "allowed_tools required object properties arguments id role tool assistant content tool_calls "
    "parameters strict json grammar yacc lark"
)
_STRANGE = (
    "response_format json_schema grammar grammar_type structured_outputs guided_json guided_regex "
    "guided_choice guided_grammar tools tool_choice tool_schemas parallel_tool_calls "
    "reasoning_effort messages"
)
WORDS, STRANGE = _WORDS.split(), _STRANGE.split()


def _anything(rng: np.random.Generator, depth: int = 3) -> Any:
    kind = rng.integers(10 if depth else 6)
    if kind < 3:
        return (None, True, [0, -5, 10**30, 1.5, math.inf][rng.integers(5)])[kind]
    if kind < 6:
        return WORDS[rng.integers(len(WORDS))]
    values = [_anything(rng, depth - 1) for _ in range(rng.integers(4))]
    return values if kind < 8 else {WORDS[rng.integers(len(WORDS))]: value for value in values}


def test_whatever_a_field_holds(rng: np.random.Generator) -> None:
    """It is taken, or refused by name; nothing else goes wrong."""
    for _ in range(2000):
        fields = {STRANGE[i]: _anything(rng) for i in rng.integers(len(STRANGE), size=2)}
        with suppress(InvalidRequest):
            chat(**fields)
