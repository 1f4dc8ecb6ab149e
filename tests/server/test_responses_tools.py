"""Loops of tools, forms and reasoning through Responses and Messages, with official clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import jsonschema
import openai
import pydantic
import pytest
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from scripted import Scripted, scripted
from servers import Process, Running, in_thread

from squall import Model

NUMBERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
RUN = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b}
OPENAI: Any = [
    {"type": "function", "name": name, "parameters": NUMBERS, "strict": True} for name in RUN
]
ANTHROPIC: Any = [{"name": name, "input_schema": NUMBERS} for name in RUN]


def call(name: str, **arguments: int) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


SCRIPT = {
    "result 42": "It is 42.",
    "result 7": "Now the product.\n" + call("mul", a=7, b=6),
    "What is": call("add", a=3, b=4),
    "both": call("add", a=1, b=2) + "\n" + call("mul", a=3, b=4),
}
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{# <think></think> {{ reasoning_effort }} #}"
)
QUESTION = "What is (3 + 4) * 6?"


@pytest.fixture(scope="module")
def known(model: Model) -> Iterator[Scripted]:
    with scripted(model, SCRIPT) as found:
        yield found


@pytest.fixture(scope="module")
def running(known: Scripted, model: Model) -> Iterator[Running]:  # noqa: ARG001
    with in_thread(model) as found:
        yield found


OTHERS: Any = [
    {"type": "web_search", "external_web_access": False}, {"type": "local_shell"},
    {"type": "custom", "name": "apply_patch", "format": {"type": "text"}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "asked", "others", "answer"),
    [
        ("responses", {"input": QUESTION, "tools": OPENAI}, OTHERS, "output"),
        (
            "messages", {"messages": [{"role": "user", "content": QUESTION}], "tools": ANTHROPIC},
            [{"type": "web_search_20250305", "name": "web_search"}], "content",
        ),
    ],
)  # fmt: skip
def test_tools_of_other_kinds_are_ignored_and_told(
    running: Running, path: str, asked: dict[str, Any], others: list[Any], answer: str
) -> None:
    """Coding agents send them to whatever server there is."""
    body = asked | {"tools": [*others, *asked["tools"]], "max_tokens": 64}
    found = httpx.post(f"{running.url}/v1/{path}", json=body)
    assert found.headers["x-squall-ignored"] == ", ".join(f"tools.{o['type']}" for o in others)
    assert [item["name"] for item in found.json()[answer]] == ["add"]


@pytest.fixture
def gpt(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture
def claude(running: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as found:
        yield found


def respond(client: openai.OpenAI, *, stream: bool, **asked: Any) -> Any:
    """A response, whole or as a stream comes to it."""
    asked = {"model": "m", "max_output_tokens": 200} | asked
    if not stream:
        return client.responses.create(**asked)
    with client.responses.stream(**asked) as events:
        return events.get_final_response()


def results(output: Any) -> list[Any]:
    """What the tools answer to calls of a response."""
    return [
        {
            "type": "function_call_output", "call_id": item.call_id,
            "output": f"result {RUN[item.name](**json.loads(item.arguments))}",
        }
        for item in output
        if item.type == "function_call"
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_row_5_a_loop_of_two_calls_in_responses(
    gpt: openai.OpenAI, known: Scripted, stream: bool, kept: bool
) -> None:
    """With all items as input each time, or after the last response."""
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {"tools": OPENAI, "stream": stream, "input": items}
    kinds, known.prompts[:] = [], []
    for _ in range(5):
        found = respond(gpt, **asked)
        kinds.append([item.type for item in found.output])
        assert found.status == "completed"
        if not (new := results(found.output)):
            break
        items += [*(item.to_dict() for item in found.output), *new]
        if kept:
            asked |= {"previous_response_id": found.id, "input": new}
    assert kinds == [["function_call"], ["message", "function_call"], ["message"]]
    assert found.output_text == "It is 42."
    assert "result 7" in known.prompts[1]
    assert known.prompts[2].startswith(known.prompts[1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_row_5_a_loop_of_langchain(running: Running, stream: bool, kept: bool) -> None:
    def add(a: int, b: int) -> str:
        """The sum."""
        return f"result {a + b}"

    def mul(a: int, b: int) -> str:
        """The product."""
        return f"result {a * b}"

    llm = ChatOpenAI(
        model="m", base_url=f"{running.url}/v1", api_key=pydantic.SecretStr("any"),
        use_responses_api=True, use_previous_response_id=kept, streaming=stream,
    )  # fmt: skip
    asked: Any = {"messages": [{"role": "user", "content": QUESTION}]}
    found = create_agent(llm, [add, mul]).invoke(asked)["messages"]
    assert [message.text for message in found if message.type == "tool"] == [
        "result 7",
        "result 42",
    ]
    assert found[-1].text == "It is 42."


@pytest.mark.parametrize("stream", [False, True])
def test_row_5_a_loop_of_two_calls_in_messages(
    claude: anthropic.Anthropic, known: Scripted, stream: bool
) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    reasons, known.prompts[:] = [], []
    for _ in range(5):
        asked: Any = {"model": "m", "max_tokens": 200, "tools": ANTHROPIC, "messages": messages}
        if stream:
            with claude.messages.stream(**asked) as events:
                found: Any = events.get_final_message()
        else:
            found = claude.messages.create(**asked)
        reasons.append(found.stop_reason)
        new = [
            {
                "type": "tool_result", "tool_use_id": block.id,
                "content": f"result {RUN[block.name](**block.input)}",
            }
            for block in found.content
            if block.type == "tool_use"
        ]  # fmt: skip
        if not new:
            break
        content = [block.to_dict() for block in found.content]
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": new}]
    assert reasons == ["tool_use", "tool_use", "end_turn"]
    assert found.content[0].text == "It is 42."
    assert known.prompts[2].startswith(known.prompts[1])
    count = claude.messages.count_tokens(model="m", tools=ANTHROPIC, messages=messages)
    read = found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0)
    assert count.input_tokens == read


def test_both_read_the_same(
    gpt: openai.OpenAI, claude: anthropic.Anthropic, known: Scripted
) -> None:
    """Responses, Messages and chats are one conversation to the model."""
    known.prompts.clear()
    text, arguments = "result 42", '{"a": 3, "b": 4}'
    items: Any = [
        {"role": "user", "content": QUESTION},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c", "output": text},
    ]
    gpt.responses.create(
        model="m", tools=OPENAI, max_output_tokens=9, instructions="Be kind.", input=items
    )
    use = {"type": "tool_use", "id": "c", "name": "add", "input": {"a": 3, "b": 4}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": text}
    blocks: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    tools: Any = [tool | {"strict": True} for tool in ANTHROPIC]
    claude.messages.create(model="m", max_tokens=9, system="Be kind.", messages=blocks, tools=tools)
    function = {"name": "add", "arguments": arguments}
    messages: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": text},
    ]
    tools = [
        {"type": "function", "function": {"name": name, "parameters": NUMBERS, "strict": True}}
        for name in RUN
    ]
    gpt.chat.completions.create(model="m", max_tokens=9, messages=messages, tools=tools)
    assert len(known.prompts) == 3
    assert len(set(known.prompts)) == 1


def test_several_calls_at_a_time(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    for more in ({}, {"parallel_tool_calls": False}):
        found = respond(gpt, stream=True, input="both", tools=OPENAI, **more)
        assert len(results(found.output)) == (1 if more else 2)
        assert len({item.call_id for item in found.output}) == len(found.output)
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    asked: Any = {
        "model": "m", "max_tokens": 200, "tools": ANTHROPIC,
        "messages": [{"role": "user", "content": "both"}],
    }  # fmt: skip
    assert len(claude.messages.create(**asked).content) == 2
    assert len(claude.messages.create(tool_choice=choice, **asked).content) == 1


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", []),
        ("required", ["add"]),
        ({"type": "function", "name": "mul"}, ["mul"]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "mul"}],
            },
            ["mul"],
        ),
    ],
)
def test_row_6_choices_in_responses(gpt: openai.OpenAI, choice: Any, names: list[str]) -> None:
    for stream in (False, True):
        found = respond(gpt, stream=stream, input=QUESTION, tools=OPENAI, tool_choice=choice)
        assert [i.name for i in found.output if i.type == "function_call"][:1] == names
        assert found.tool_choice == choice or found.tool_choice.to_dict() == choice


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "none"}, []),
        ({"type": "any"}, ["add"]),
        ({"type": "tool", "name": "mul"}, ["mul"]),
    ],
)
def test_row_6_choices_in_messages(
    claude: anthropic.Anthropic, choice: Any, names: list[str]
) -> None:
    found = claude.messages.create(
        model="m", max_tokens=200, tools=ANTHROPIC, tool_choice=choice,
        messages=[{"role": "user", "content": QUESTION}],
    )  # fmt: skip
    assert [b.name for b in found.content if b.type == "tool_use"][:1] == names
    assert found.stop_reason == ("tool_use" if names else "end_turn")


def test_row_6_a_call_that_is_cut(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    for most in (1, 2, 9, 14, 19, 24, 29, 99):
        asked: Any = {"input": QUESTION, "tools": OPENAI, "max_output_tokens": most, "model": "m"}
        whole = gpt.responses.create(**asked)
        *_, last = gpt.responses.create(stream=True, **asked)
        for item in (*whole.output, *last.response.output):  # type: ignore[union-attr]
            item.id = item.call_id = ""  # type: ignore[union-attr]
        assert last.response.output == whole.output  # type: ignore[union-attr]
        found = claude.messages.create(
            model="m", max_tokens=most, tools=ANTHROPIC,
            messages=[{"role": "user", "content": QUESTION}],
        )  # fmt: skip
        if whole.status == "completed":
            break
        assert found.stop_reason == "max_tokens"
        assert whole.output[-1].status == "incomplete"  # type: ignore[union-attr]
    assert whole.output[0].arguments == '{"a": 3, "b": 4}'  # type: ignore[union-attr]
    assert found.stop_reason == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(model: Model, stream: bool) -> None:
    template = model.chat_template
    model.set_chat_template(THINKS)
    script = {"<think>": "No.", "Hi": "<think>\nLet me see.\n</think>\n\nYes."}
    try:
        with scripted(model, script), in_thread(model) as running:
            with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any") as gpt:
                found = respond(gpt, stream=stream, input="Hi")
                again = respond(gpt, stream=stream, input="Hi", reasoning={"effort": "none"})
            with anthropic.Anthropic(base_url=running.url, api_key="any") as claude:
                asked: Any = {
                    "model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]
                }  # fmt: skip
                with claude.messages.stream(**asked) as events:
                    message = events.get_final_message()
                briefly = claude.messages.create(thinking={"type": "disabled"}, **asked)
    finally:
        model.chat_template = template
    assert [item.type for item in found.output] == ["reasoning", "message"]
    assert found.output[0].content[0].text == "Let me see."
    assert found.output_text == "Yes."
    assert found.usage.output_tokens_details.reasoning_tokens > 3
    assert [item.type for item in again.output] == ["message"]
    assert again.output_text == "No."
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Let me see."  # type: ignore[union-attr]
    assert [block.type for block in briefly.content] == ["text"]


class Answer(pydantic.BaseModel):
    """A form."""

    name: str
    size: int


def test_row_8_forms_in_responses(server: Process, client: openai.OpenAI) -> None:
    asked: Any = {"model": "small", "max_output_tokens": 80, "input": "A cat.", "temperature": 1}
    for seed in range(2):
        extra = {"seed": seed}
        found = client.responses.parse(text_format=Answer, extra_body=extra, **asked)
        assert found.status == "incomplete" or isinstance(found.output_parsed, Answer)
        with client.responses.stream(text_format=Answer, extra_body=extra, **asked) as stream:
            *_, last = stream
        assert last.response.output_text == found.output_text  # type: ignore[union-attr]
    form: Any = {"format": {"type": "json_object"}}
    found = client.responses.create(text=form, **asked)
    assert found.status == "incomplete" or isinstance(json.loads(found.output_text), dict)
    with anthropic.Anthropic(base_url=server.url, api_key="any") as claude:
        message = claude.messages.create(
            model="small", max_tokens=80, messages=[{"role": "user", "content": "A cat."}],
            output_config={"format": {"type": "json_schema", "schema": Answer.model_json_schema()}},
        )  # fmt: skip
    if message.stop_reason == "end_turn":
        text: Any = message.content[0]
        jsonschema.validate(json.loads(text.text), Answer.model_json_schema())


def test_row_5_calls_of_a_model_are_valid(server: Process, client: openai.OpenAI) -> None:
    for seed in range(2):
        found = client.responses.create(
            model="small", max_output_tokens=80, input="Add something.", temperature=1,
            tools=OPENAI, tool_choice="required", extra_body={"seed": seed},
        )  # fmt: skip
        if found.status == "completed":
            for item in found.output:
                jsonschema.validate(json.loads(item.arguments), NUMBERS)  # type: ignore[union-attr]
    with anthropic.Anthropic(base_url=server.url, api_key="any") as claude:
        message = claude.messages.create(
            model="small", max_tokens=80, tools=ANTHROPIC, tool_choice={"type": "any"},
            messages=[{"role": "user", "content": "Add something."}],
        )  # fmt: skip
    if message.stop_reason == "tool_use":
        for block in message.content:
            jsonschema.validate(block.input, NUMBERS)  # type: ignore[union-attr]
