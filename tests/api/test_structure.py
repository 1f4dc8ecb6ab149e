"""The shape of an answer: every name that APIs have for it, and what comes of it."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from helpers import wait_for
from pydantic import BaseModel, Field

from squall import ChatCompletionRequest, CompletionRequest, Grammar, InvalidRequest, Model, Runner
from squall.api.chats import structure
from squall.text.chat import ChatPrompt
from squall.text.reasoning import Reasoning
from squall.text.tool_formats import FORMATS

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = Grammar.json_schema(SCHEMA)


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=150)


def asked(**fields: Any) -> Grammar | None:
    """What these fields come to, for chats and for completions."""
    chat = ChatCompletionRequest(messages="Hi", **fields).structure()
    text = CompletionRequest(prompt="Hi", **fields).structure()
    assert chat == text
    return chat and chat.grammar


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": SCHEMA},
        {"json_schema": SCHEMA},
        {"grammar": JSON},
        {"grammar": {"type": "json_schema", "value": SCHEMA}},
        {"grammar": json.dumps(SCHEMA), "grammar_type": "json_schema"},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_one_schema_by_many_names(fields: dict[str, Any]) -> None:
    assert asked(**fields) == JSON


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        ({"grammar": "a+", "grammar_type": "regex"}, Grammar("regex", "a+")),
        ({"grammar": {"type": "regex", "value": "a+"}}, Grammar("regex", "a+")),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, Grammar.choice(["a", "b"])),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar.choice(["a", "b"])),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
    ],
)
def test_other_shapes_by_many_names(fields: dict[str, Any], grammar: Grammar | None) -> None:
    assert asked(**fields) == grammar


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.*xml.*json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.*schema"),
        ({"response_format": {"type": "json_schema", "json_schema": 5}}, "response_format.*schema"),
        ({"grammar": "a+"}, "grammar.*grammar_type"),
        ({"grammar_type": "regex"}, "grammar_type.*grammar"),
        ({"grammar": "a+", "grammar_type": "perl"}, "grammar.*perl.*regex"),
        ({"grammar": {"type": [], "value": "a"}}, "grammar"),
        ({"grammar": {"type": "regex", "value": 5}}, "grammar"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.*one of"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.*structural_tag"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex.*guided_choice"),
        ({"response_format": {"type": "json_object"}, "grammar": JSON}, "response_format.*grammar"),
    ],
)
def test_shapes_that_are_wrong(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        asked(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_json": {"type": "objet"}}, "guided_json"),
        ({"response_format": {"not": {"type": "null"}}, "json_schema": None}, "response_format"),
        ({"json_schema": {"type": "array", "contains": {}}}, "json_schema.*contains"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
    ],
)
def test_row_8_what_cannot_be_enforced_is_refused(
    model: Model, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named), Runner(model) as runner:
        runner.send_completion_request(CompletionRequest(prompt="Hi", **fields))


def test_a_class_of_pydantics(model: Model) -> None:
    runner = Runner(model)
    request = ChatCompletionRequest(
        messages="Tell me of a person.", response_format=Person, temperature=1, n=4, seed=1
    )
    for choice in runner.send_chat_completion_request(request).choices:
        assert choice.finish_reason == "stop"
        Person.model_validate_json(choice.message.content)


DOORS: list[dict[str, Any]] = [
    {"response_format": Person}, {"guided_regex": "[0-9]{3}-[0-9]{4}"}, {},
    {"guided_choice": ["red", "green", "dark blue"]}, {"response_format": {"type": "json_object"}},
    {"grammar": '%%\nA: "a" A | "b";', "grammar_type": "yacc"},
]  # fmt: skip


@pytest.mark.parametrize("temperature", [0, 1])
def test_different_shapes_at_a_time_are_what_each_is_alone(
    model: Model, temperature: float
) -> None:
    requests = [
        ChatCompletionRequest(
            messages=f"Say something, {number}.",
            max_tokens=24,
            seed=number,
            temperature=temperature,
            logprobs=True,
            **fields,
        )
        for number, fields in enumerate(DOORS * 2)
    ]
    runner = Runner(model)
    jobs = [runner._chat(request) for request in requests]
    together = [job.response().choices[0].to_dict() for job in jobs]
    for request, found in zip(requests, together, strict=True):
        assert runner.send_chat_completion_request(request).choices[0].to_dict() == found
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", together[1]["message"]["content"])
    assert together[3]["message"]["content"] in ("red", "green", "dark blue")


@pytest.mark.parametrize("fields", DOORS)
def test_streams_say_the_same_as_wholes(model: Model, fields: dict[str, Any]) -> None:
    request = ChatCompletionRequest(messages="Say something.", max_tokens=24, seed=3, n=2, **fields)
    runner = Runner(model)
    texts, reasons = ["", ""], ["", ""]
    for chunk in runner.stream_chat_completion_request(request):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content
            reasons[choice.index] = choice.finish_reason
    whole = runner.send_chat_completion_request(request)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_completions_have_shapes_too(model: Model) -> None:
    request = CompletionRequest(
        prompt=["A date:", "Another:"], guided_regex="[0-9]{4}-[0-9]{2}", echo=True, logprobs=0
    )
    found = Runner(model).send_completion_request(request)
    for choice, prompt in zip(found.choices, request.prompts, strict=True):
        assert re.fullmatch(re.escape(str(prompt)) + "[0-9]{4}-[0-9]{2}", choice.text)
        assert "".join(choice.logprobs.tokens) == choice.text


def test_an_answer_that_is_left_frees_its_place(model: Model) -> None:
    request = ChatCompletionRequest(messages="Go on.", guided_regex="(ab)*", max_tokens=200)
    stream = Runner(model).stream_chat_completion_request(request)
    next(stream)
    stream.close()
    wait_for(lambda: model.engine.stats().running == 0)


@pytest.mark.parametrize("grammar", [JSON, SCHEMA, Person])
def test_generate_takes_grammars_schemas_and_classes(model: Model, grammar: Any) -> None:
    for prompt in ("Ann:", [{"role": "user", "content": "Ann?"}]):
        text = model.generate(prompt, grammar=grammar, max_tokens=80, temperature=0).read()
        jsonschema.validate(json.loads(text), SCHEMA)
    with pytest.raises(InvalidRequest, match="regex"):
        model.generate("Ann:", grammar=Grammar("regex", "(a"))


def test_marks_of_calls_in_the_reasoning_begin_none() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    request = ChatCompletionRequest(messages="Hi", tools=[tool])
    prompt = ChatPrompt([], FORMATS[-1], Reasoning("<think>", "</think>"))
    found = structure(request, prompt)
    assert found is not None
    assert "& ~/[ \\n]*<think>" in found.grammar.value
