"""Calls of tools and reasoning in chats, where what the model says is known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, scripted

from squall import ChatCompletionRequest, InvalidRequest, Model, Runner, ToolChoice
from squall.api.jobs import start_chat
from squall.engine.request import Request
from squall.text.tools import Tool

TEMPLATES = Path(__file__).parents[1] / "text/tool_templates"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
MUL = {"type": "function", "function": {**ADD["function"], "name": "mul"}}  # type: ignore[dict-item]


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


ONE = call("add", a=3, b=4)
SCRIPT = {
    "two calls": f"{ONE}\n{call('mul', a=5, b=6)}",
    "words and a call": f"Let me see: {{\"a\": 1}} é.\n\n{ONE}",
    "one call": ONE,
    "words": "I do not need any <tool for that.",
    "json": '{"total": 7}',
    "nothing": "",
}  # fmt: skip
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{# <think></think> {{ reasoning_effort }} #}"
)


@pytest.fixture(scope="module")
def known(model: Model) -> Iterator[Scripted]:
    with scripted(model, SCRIPT) as found:
        yield found


def ask(model: Model, text: str, **fields: Any) -> dict[str, Any]:
    """The whole answer, after a look whether a stream says the same."""
    given: dict[str, Any] = {"tools": [ADD, MUL], "max_tokens": 100, "seed": 1} | fields
    request = ChatCompletionRequest(messages=text, **given)
    whole = Runner(model).send_chat_completion_request(request).to_dict()
    streamed = joined(Runner(model).stream_chat_completion_request(request))
    for choice, other in zip(whole["choices"], streamed, strict=True):
        for number, made in enumerate(choice["message"].get("tool_calls", [])):
            assert re.fullmatch("call_[0-9a-f]{24}|[0-9A-Za-z]{9}", made["id"])
            made["id"] = other["message"]["tool_calls"][number]["id"] = None
        assert {k: v for k, v in choice.items() if k != "logprobs"} == other
    found: dict[str, Any] = whole["choices"][0] | {"usage": whole["usage"]}
    return found


def joined(chunks: Any) -> list[dict[str, Any]]:
    """The choices that the deltas of a stream come to."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk.to_dict()["choices"]:
            delta, index = part["delta"], part["index"]
            choice = choices.setdefault(index, {"index": index, "message": {"content": None}})
            message = choice["message"]
            for name in ("content", "reasoning_content"):
                if delta.get(name) is not None:
                    message[name] = (message.get(name) or "") + delta[name]
            message |= {"role": delta["role"]} if "role" in delta else {}
            for made in delta.get("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if made["index"] == len(calls):
                    calls.append(made | {"function": {**made["function"]}})
                    del calls[-1]["index"]
                else:
                    assert made.keys() == {"index", "function"}
                    calls[-1]["function"]["arguments"] += made["function"]["arguments"]
            choice["finish_reason"] = part["finish_reason"]
    return [choices[index] for index in sorted(choices)]


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    made = [call["function"] for call in choice["message"].get("tool_calls", [])]
    return [(function["name"], json.loads(function["arguments"])) for function in made]


@pytest.mark.usefixtures("known")
def test_row_5_streamed_and_whole_calls_are_the_same(model: Model) -> None:
    one = ("add", {"a": 3, "b": 4})
    found = ask(model, "two calls", n=3)
    assert calls_of(found) == [one, ("mul", {"a": 5, "b": 6})]
    assert (found["message"]["content"], found["finish_reason"]) == (None, "tool_calls")
    found = ask(model, "words and a call")
    assert calls_of(found) == [one]
    assert found["message"]["content"] == 'Let me see: {"a": 1} é.'
    for text in ("words", "json", "nothing"):
        found = ask(model, text)
        assert found["message"]["content"] == (SCRIPT[text] or None)
        assert found["finish_reason"] == "stop"
        assert "tool_calls" not in found["message"]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("choice", ["none", "auto", "required", ADD, "allowed"])
def test_row_6_finish_reasons(model: Model, choice: Any) -> None:
    """Wherever an answer is cut: `length`; `tool_calls` if and only if there are whole calls."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    if choice == "allowed":
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}}
    elif choice == ADD:
        choice = tools[0]
    length = ask(model, "one call", tool_choice=choice)["usage"]["completion_tokens"]
    for most in range(1, length + 2):
        found = ask(model, "one call", tool_choice=choice, max_tokens=most)
        made = found["message"].get("tool_calls", [])
        if found["finish_reason"] == "tool_calls":
            assert calls_of(found) == [("add", {"a": 3, "b": 4})]
        elif choice == "none":
            assert not made
            assert found["finish_reason"] == ("length" if most < length else "stop")
        else:
            assert found["finish_reason"] == "length"
    assert found["finish_reason"] == ("stop" if choice == "none" else "tool_calls")


@pytest.mark.usefixtures("known")
def test_stop_strings_in_calls_and_in_words(model: Model) -> None:
    found = ask(model, "one call", stop='"b"')
    assert found["finish_reason"] == "stop"
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 3, '
    found = ask(model, "words and a call", stop="see")
    assert (found["finish_reason"], found["message"]["content"]) == ("stop", "Let me ")


def test_what_the_model_is_shown(model: Model, known: Scripted) -> None:
    ask(model, "words")
    assert "The sum of two numbers." in known.prompts[-1]
    ask(model, "words", tool_choice=ToolChoice.NoTools)
    assert "The sum of two numbers." not in known.prompts[-1]
    ask(model, "words", tools=None, tool_schemas=[json.dumps(ADD)], tool_choice=ToolChoice.Auto)
    assert "The sum of two numbers." in known.prompts[-1]
    messages = [
        {"role": "user", "content": "What is 3 + 4, in words?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "one", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
        ]},
        {"role": "tool", "tool_call_id": "one", "content": [{"type": "text", "text": "seven"}]},
    ]  # fmt: skip
    for tools in ([ADD], None):
        request = ChatCompletionRequest(messages=messages, tools=tools)
        Runner(model).send_chat_completion_request(request)
        assert "seven" in known.prompts[-1].rpartition('{"a": 3}')[2]


def test_mistral_rs_programs(model: Model, known: Scripted) -> None:
    """They have tools as JSON, and send calls and results back as plain contents."""
    messages = [{"role": "user", "content": "one call"}]
    runner = Runner(model)
    request = ChatCompletionRequest(
        model="any", messages=messages, max_tokens=256, presence_penalty=1.0, top_p=0.9,
        temperature=0.1, tool_schemas=[json.dumps(ADD)], tool_choice=ToolChoice.Auto,
    )  # fmt: skip
    called = runner.send_chat_completion_request(request).choices[0].message.tool_calls[0].function
    arguments = json.loads(called.arguments)
    said = json.dumps({"name": called.name, "parameters": arguments})
    messages += [
        {"role": "assistant", "content": said},
        {"role": "tool", "content": str(arguments["a"] + arguments["b"])},
    ]
    request = ChatCompletionRequest(
        model="any", messages=messages, max_tokens=256, tool_schemas=[json.dumps(ADD)],
        tool_choice=ToolChoice.Auto,
    )  # fmt: skip
    runner.send_chat_completion_request(request)
    assert "7" in known.prompts[-1].rpartition(said)[2]
    request = ChatCompletionRequest(
        messages="A list.", max_tokens=16, grammar_type="regex", grammar="( - [a-z]*\n)+"
    )
    found = runner.send_chat_completion_request(request).choices[0].message.content or ""
    assert found.startswith(" - ")


@pytest.mark.parametrize("file", [*TEMPLATES.glob("*.jinja")], ids=lambda file: file.stem)
def test_row_5_the_formats_of_models(
    model: Model, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.setattr(model, "chat_template", model.chat_template.replaced(str(file)))
    tools = [Tool.of(ADD), Tool.of(MUL)]
    prompt = model.chat_prompt([{"role": "user", "content": "one call"}], tools=tools)
    assert prompt.format is not None
    answer = prompt.format.text([("add", '{"a": 3, "b": 4}')])
    thought = prompt.reasoning is not None and prompt.reasoning.begun
    if prompt.reasoning is not None and thought:
        answer = f"Hm.{prompt.reasoning.closing}\n\n{answer}"
    with scripted(model, {"one call": answer}, marker=re.escape(prompt.text[-20:])):
        for choice in ("auto", "required", ADD):
            found = ask(model, "one call", tool_choice=choice)
            assert calls_of(found) == [("add", {"a": 3, "b": 4})]
            assert found["finish_reason"] == "tool_calls"
            assert found["message"]["content"] is None
            assert found["message"].get("reasoning_content") == ("Hm." if thought else None)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [({}, False), ({"tools": [ADD]}, False), ({"guided_regex": " [a-z]+"}, True)],
)
def test_a_leading_space_is_kept_where_a_shape_asks_for_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], kept: bool
) -> None:
    asked: list[Request] = []
    submit = model.engine.submit
    monkeypatch.setattr(model.engine, "submit", lambda r, s: asked.append(r) or submit(r, s))
    request = ChatCompletionRequest(messages="Hi", max_tokens=1, **fields)
    Runner(model).send_chat_completion_request(request)
    assert asked[0].continues is kept


@pytest.mark.usefixtures("known")
def test_calls_or_json(model: Model) -> None:
    schema = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
    found = ask(model, "json", response_format=schema)
    assert (found["message"]["content"], found["finish_reason"]) == ('{"total": 7}', "stop")
    found = ask(model, "one call", response_format=schema)
    assert (calls_of(found), found["finish_reason"]) == ([("add", {"a": 3, "b": 4})], "tool_calls")
    found = ask(model, "words", response_format=schema)
    assert calls_of(found) or json.loads(found["message"]["content"])
    found = ask(model, "json", response_format=schema, tool_choice="required", max_tokens=200)
    assert found["message"]["content"] is None
    with pytest.raises(InvalidRequest, match=r"guided_regex.*tools"):
        ask(model, "json", guided_regex="a")


@pytest.mark.usefixtures("known")
def test_logprobs_of_calls_are_told_token_by_token(model: Model) -> None:
    request = ChatCompletionRequest(messages="one call", tools=[ADD], logprobs=True)
    whole = Runner(model).send_chat_completion_request(request).choices[0]
    assert "".join(entry.token for entry in whole.logprobs.content) == ONE
    chunks = [*Runner(model).stream_chat_completion_request(request)]
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert tuple(entry for part in parts for entry in part) == whole.logprobs.content


@pytest.mark.usefixtures("known")
def test_calls_have_ids_of_their_own(model: Model) -> None:
    """Also if requests have one id, as those of a trace may."""
    request = ChatCompletionRequest(messages="two calls", tools=[ADD, MUL], n=2)
    wholes = [start_chat(model, request, id="trace").response() for _ in range(2)]
    calls = [call for w in wholes for c in w.choices for call in c.message.tool_calls]
    assert len({call.id for call in calls}) == len(calls) == 8


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice.*'add'"),
        ({"tools": [ADD], "tool_choice": "maybe"}, "tool_choice.*maybe"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": []}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice"),
        ({"tools": [ADD, ADD]}, r"tools\[1\].*'add'"),
        ({"tools": [ADD], "tool_schemas": [json.dumps(ADD)]}, "tools and tool_schemas"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"tools\[0\].*'a b'"),
        ({"tools": [ADD] * 200}, "tools has 200"),
        ({"tools": 5}, "tools"),
        ({"tool_schemas": ["{"]}, r"tool_schemas\[0\].*JSON"),
        ({"tool_schemas": ["1" * 5000]}, r"tool_schemas\[0\].*JSON"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, r"messages\[0\].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, r"messages\[0\].tool_calls"),
        ({"messages": [{"role": "assistant", "function_call": {}, "content": None}]}, None),
    ],
)
def test_wrong_tools(fields: dict[str, Any], named: str | None) -> None:
    given = {"messages": "Hi"} | fields
    if named is None:
        ChatCompletionRequest(**given)
        return
    with pytest.raises(InvalidRequest, match=named):
        ChatCompletionRequest(**given)


@pytest.fixture
def thinking(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(model, "chat_template", model.chat_template.replaced(THINKS))
    script = {
        "at once": '{"total": 7}',
        "schema": '<think>\nIs {"total": 8} right? No.\n</think>\n\n{"total": 7}',
        "Hm": "<think>\nLet me see.\n</think>\n\nYes.",
        "cut": "<think>\nLet me see." + " And see." * 50,
    }
    with scripted(model, script) as found:
        yield found


@pytest.mark.usefixtures("thinking")
def test_reasoning_is_told_apart(model: Model) -> None:
    found = ask(model, "Hm", tools=None)
    assert found["message"] == {
        "role": "assistant", "content": "Yes.", "reasoning_content": "Let me see."
    }  # fmt: skip
    details = found["usage"]["completion_tokens_details"]
    assert 4 <= details["reasoning_tokens"] < found["usage"]["completion_tokens"] - 4
    found = ask(model, "cut", tools=None, max_tokens=20)
    assert (found["finish_reason"], found["message"]["content"]) == ("length", "")
    assert found["message"]["reasoning_content"].startswith("Let me see. And see.")


@pytest.mark.parametrize("effort", [None, "high", "none"])
@pytest.mark.usefixtures("thinking")
def test_row_8_shapes_begin_after_the_reasoning(model: Model, effort: str | None) -> None:
    schema = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
    found = ask(model, "schema", tools=None, response_format=schema, reasoning_effort=effort)
    assert isinstance(json.loads(found["message"]["content"])["total"], int)
    reasoning = found["message"].get("reasoning_content")
    assert reasoning == (None if effort == "none" else 'Is {"total": 8} right? No.')


@pytest.mark.usefixtures("thinking")
def test_who_does_not_reason_answers_at_once(model: Model) -> None:
    schema = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
    for fields in ({"tools": None, "response_format": schema}, {"tools": [ADD]}):
        found = ask(model, "at once", **fields)
        assert (found["finish_reason"], found["message"]["content"]) == ("stop", '{"total": 7}')
        assert "reasoning_content" not in found["message"]


def test_efforts_are_variables_for_the_template(model: Model, thinking: Scripted) -> None:
    ask(model, "Hm", tools=None, reasoning_effort="none")
    assert thinking.prompts[-1].endswith("<think>\n\n</think>\n\n")
    for effort in ("low", "xhigh", "max"):
        request = ChatCompletionRequest(messages="Hm", reasoning_effort=effort)
        assert request.template_kwargs == {"reasoning_effort": effort}
    given = {"enable_thinking": True}
    request = ChatCompletionRequest(
        messages="Hm", reasoning_effort="none", chat_template_kwargs=given
    )
    assert request.template_kwargs == {"reasoning_effort": "none", "enable_thinking": True}


def test_earlier_reasoning_goes_to_the_template(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }} {% endfor %}"
    monkeypatch.setattr(model, "chat_template", model.chat_template.replaced(template))
    messages = [{"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]
    request = ChatCompletionRequest(messages=messages)
    assert model.chat_prompt([*request.messages]).text == "Hm.|Yes. "  # type: ignore[list-item]
