"""Tools of MCP servers, as the official package makes them: from Python, and run by our server."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from mcp_types import Tool
from scripted import scripted
from servers import Running, connect, events, in_process, in_thread, post_bytes, read_until, until

from squall import InvalidRequest, Model, tools
from squall import mcp as ours
from squall.cli.serve import ServeFlags, _tools
from squall.mcp import McpTools

HERE = Path(__file__).parent
PROGRAM = {"command": sys.executable, "args": [str(HERE / "mcp_server.py")], "cwd": str(HERE)}
ODD = {"command": sys.executable, "args": [str(HERE / "mcp_odd.py")]}
SERVERS = {
    "mcpServers": {
        "one": {**PROGRAM, "env": {"PLACE": "here"}, "allow": ["add", "where"]},
        "two": {**PROGRAM, "env": {"PLACE": "there"}, "type": "stdio"},
        "off": {"command": "nothing-like-this", "disabled": True},
    }
}
ALLOW = ["two.where", "two.fail", "two.hang", "two.crash", "two.much", "two.picture"]


def call(name: str, /, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


SCRIPT = {
    '{"n": 9}': "Never.",
    "Slowly": call("two__hang"),
    "Forever": call("one__add", a=1, b=1),
    "... (99": "Long.",
    "Much": "\n".join([call("two__much")] * 8),
    "there, server": "Both know.",
    "here, server": f"One knows. {call('two__where')}",
    "Where": call("one__where"),
    "42": "It is 42.",
    "How much": call("one__add", a=40, b=2),
    "Hello": "Hello to you.",
}


@pytest.fixture(scope="module")
def found() -> Iterator[McpTools]:
    with McpTools(SERVERS, ALLOW) as tools_:
        yield tools_


@pytest.fixture(scope="module")
def running(model: Model, found: McpTools) -> Iterator[Running]:
    with scripted(model, SCRIPT), in_thread(model, mcp=found, keep_alive_s=0.05) as one:
        yield one


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client


def test_only_allowed_tools_are_there(found: McpTools) -> None:
    names = [tool["function"]["name"] for tool in found.tools]
    assert names == [
        "one__add", "one__where", "two__where", "two__fail", "two__hang",
        "two__crash", "two__much", "two__picture",
    ]  # fmt: skip
    assert found.tools[0]["function"]["description"] == "The sum of two numbers."
    assert found.tools[0]["function"]["parameters"]["required"] == ["a", "b"]


def test_calls_go_to_their_servers(found: McpTools) -> None:
    assert found.call("one__add", '{"a": 40, "b": 2}') == "42"
    assert found.call("one__where", "{}") == "here, server"
    assert found.call("two__where", "") == "there, server"
    assert found.call("two__picture", "{}") == "[image]"


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("two__fail", "{}", "Error executing tool fail"),
        ("one__add", '{"a": "no number", "b": 2}', "valid integer"),
        ("one__add", "[1]", "error: "),
        ("one__add", '{"a": ', "error: "),
    ],
)
def test_what_goes_wrong_is_told(found: McpTools, name: str, arguments: str, told: str) -> None:
    result = found.call(name, arguments)
    assert result.startswith("error: ")
    assert told in result
    assert len(result) < 2000


def test_a_tool_that_hangs(found: McpTools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found._known["two__hang"][1].func.__self__, "_call_s", 0.2)
    assert found.call("two__hang", "{}") == "error: hang took more than 0.2 s"
    monkeypatch.undo()
    assert found.call("two__where", "{}") == "there, server"


def test_long_results_are_cut(found: McpTools) -> None:
    result = found.call("two__much", "{}")
    assert len(result) < 21_000
    assert result.endswith("x ... (980000 more are cut)")


def test_a_server_that_crashes_begins_anew(found: McpTools) -> None:
    result = found.call("two__crash", "{}")
    assert result.startswith("error: the MCP server ended")
    assert "out of luck" in result
    assert found.call("one__add", '{"a": 1, "b": 2}') == "3"
    assert found.call("two__where", "{}") == "there, server"


def is_open(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_at_a_url() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, str(HERE / "mcp_server.py"), str(port)]
    with subprocess.Popen(program, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: is_open(port))
            at = {"url": f"http://127.0.0.1:{port}/mcp", "headers": {"X-Key": "k"}, "type": "http"}
            with McpTools({"mcpServers": {"far": at}}, ["*"], call_s=1) as found:
                assert found.call("far__add", '{"a": 1, "b": 2}') == "3"
                assert found.call("far__hang", "{}") == "error: hang took more than 1 s"
                assert found.call("far__add", '{"a": 1, "b": 3}') == "4"
            with pytest.raises(InvalidRequest, match="HTTP 404 Not Found"):
                McpTools({"mcpServers": {"far": at | {"url": f"{at['url']}/none"}}}, ["*"])
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("servers", "allow", "told"),
    [
        ({}, [], "mcpServers: Field required"),
        ({"mcpServers": {"a": {}}}, [], "'a' must have a command or a url"),
        ({"mcpServers": {"a": {"command": "x", "url": "y"}}}, [], "one of them"),
        ({"mcpServers": {"a.b": {"command": "x"}}}, [], "without a dot"),
        ({"mcpServers": {"a": {"command": "x", "type": "sse"}}}, [], "type"),
        ({"mcpServers": {"a": {"command": "/none"}}}, [], "'a' did not start.*/none"),
        (
            {"mcpServers": {"a": {"command": "sh", "args": ["-c", "echo no luck >&2"]}}},
            [],
            "no luck",
        ),
        ({"mcpServers": {"a": {"command": "/none"}, "b": ODD}}, [], "'a' did not start"),
        ({"mcpServers": {"a": {"url": "http://127.0.0.1:9/mcp"}}}, [], "'a' did not start"),
        ({"mcpServers": {}}, [], "no tool is allowed"),
        ({"mcpServers": {}}, ["a.b"], "'a.b' allows no tool"),
    ],
)
def test_servers_that_cannot_be_used(servers: Any, allow: list[str], told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        McpTools(servers, allow)


def test_the_tools_that_could_be_allowed_are_told() -> None:
    with pytest.raises(InvalidRequest, match=r"those there are, as SERVER.TOOL: 'a.do', 'b.do'$"):
        McpTools({"mcpServers": {"a": ODD, "b": ODD}})


def test_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.json.*No such file"):
        McpTools(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"a\.json.*mcpServers"):
        McpTools(tmp_path / "a.json")


def odd(way: str, **options: Any) -> McpTools:
    servers = {"a": {**ODD, "args": [*ODD["args"], way]}}
    return McpTools({"servers": servers}, ["*"], **options)  # as VS Code calls them


@pytest.mark.parametrize("way", ["pages", "silent"])
def test_a_server_whose_tools_never_end(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "CONNECT_S", 2.0)
    with pytest.raises(InvalidRequest, match=r"'a' did not start: no answer in 2 s"):
        odd(way)


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "CONNECT_S", 0.2)
    since_s = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"no answer in 0\.2 s"):
        McpTools({"mcpServers": {"a": {"command": "sleep", "args": ["600"]}}}, ["*"])
    assert time.monotonic() - since_s < 10


def test_a_server_that_prints_what_is_no_message() -> None:
    with odd("noise") as found:
        assert found.call("a__do", "{}") == "done"
    assert logging.getLogger("mcp").handlers  # or it would print a traceback for each line


def test_an_error_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is also the package's for a connection that is closed."""
    with odd("error") as found:
        monkeypatch.setattr(ours._Connection, "_hold", None)  # does not begin anew
        assert [found.call("a__do", "{}") for _ in range(2)] == ["error: not today"] * 2


def test_results_that_are_no_text() -> None:
    with odd("kinds") as found:
        told = found.call("a__do", "{}")
    assert told == "\nin the file\n[resource file:///a.bin]\n[resource_link file:///b.txt]"


def test_a_tool_that_is_not_there(found: McpTools) -> None:
    with pytest.raises(InvalidRequest, match=r"no tool 'one\.add'; there are one__add"):
        found.call("one.add", "{}")


def test_tools_as_nobody_should_name_them() -> None:
    class At:
        name = "my server"
        call = print

    def allowed(*listed: Tool) -> Any:
        return ours._allowed([(At(), tool) for tool in listed], ["*"])  # type: ignore[misc, list-item]

    def tool(name: str, **fields: Any) -> Tool:
        return Tool(name=name, input_schema={"type": "object"}, **fields)

    same = allowed(tool("a b"), tool("a/b"), tool("a b", description="again"), tool("x" * 200))
    assert len(same) == 3
    assert all(len(name) <= 64 for name in same)
    assert next(iter(same)) == "my_server__a_b"
    assert same["my_server__a_b"][0]["function"]["description"] == ""
    (long,) = allowed(tool("a", description="x" * 10_000)).values()
    assert len(long[0]["function"]["description"]) == 2000
    with pytest.raises(InvalidRequest, match="at most 100000"):
        allowed(Tool(name="a", input_schema={"type": "object", "x": "y" * 200_000}))
    with pytest.raises(InvalidRequest, match="at most 128"):
        allowed(*(tool(f"t{i}") for i in range(129)))


# Run by Python's loop, and by the server


def test_ours(model: Model, found: McpTools) -> None:
    def unused() -> None:
        """Nothing."""

    with scripted(model, SCRIPT):
        outcome = tools.run(model, "How much is it?", [unused, found])
    assert outcome.answer == "It is 42."
    assert outcome.messages[2]["content"] == "42"


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


CHAT = "/v1/chat/completions"


def test_chats_are_answered_with_tools(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body("Where are you?")).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "One knows.\n\nBoth know."}
    assert choice["finish_reason"] == "stop"
    assert answer["squall_tools"] == [
        {"name": "one__where", "arguments": "{}", "result": "here, server"},
        {"name": "two__where", "arguments": "{}", "result": "there, server"},
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    told = events(
        http.post(
            CHAT, json=body("Where are you?", stream=True, stream_options={"include_usage": True})
        ).text
    )
    assert told.pop() == "[DONE]"
    last = told.pop()
    assert last["usage"]["completion_tokens"] == usage["completion_tokens"]
    deltas = [event["choices"][0]["delta"] for event in told]
    assert "".join(delta["content"] for delta in deltas) == "One knows.\n\nBoth know."
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    trail = [call for event in told for call in event.get("squall_tools", ())]
    assert trail == answer["squall_tools"]
    assert [e["choices"][0]["finish_reason"] for e in told if e["choices"][0]["finish_reason"]] == [
        "stop"
    ]


def test_clients_see_only_the_answer(running: Running) -> None:
    url = running.url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as gpt:
        asked: Any = {"model": "small", "messages": body("How much?")["messages"]}
        with gpt.chat.completions.stream(**asked) as stream:
            assert stream.get_final_completion().choices[0].message.content == "It is 42."
        assert gpt.responses.create(model="small", input="How much?").output_text == "It is 42."
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as claude:
        with claude.messages.stream(max_tokens=99, **asked) as told:
            assert told.get_final_text() == "It is 42."
        assert told.get_final_message().stop_reason == "end_turn"


def test_who_calls_for_ever_has_to_answer(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body("Forever!")).json()
    assert len(answer["squall_tools"]) == 8
    assert "one__add" in answer["choices"][0]["message"]["content"]  # as text


def test_results_together_fit_the_context(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=body("Much!")).json()
    assert len(answer["squall_tools"]) == 8
    assert answer["choices"][0]["message"]["content"] == "Long."


def test_a_call_that_is_cut_is_not_told(http: httpx.Client) -> None:
    (choice,) = http.post(CHAT, json=body("Forever!", max_tokens=26)).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": ""}


def test_chats_of_ollama(http: httpx.Client) -> None:
    asked = body("How much?", model="small", stream=False)
    assert http.post("/api/chat", json=asked).json()["message"]["content"] == "It is 42."


def test_tools_whose_schema_is_too_deep_for_a_grammar(model: Model) -> None:
    with scripted(model, SCRIPT), odd("deep") as deep:
        assert tools.run(model, "Hello", [deep]).answer == "Hello to you."


def test_a_client_that_leaves_while_a_tool_runs(running: Running) -> None:
    with connect(running.port, post_bytes(CHAT, body("Slowly!", stream=True))) as leaving:
        assert b'"role"' in read_until(leaving, b'"role"')
        until(lambda: running.model.engine.stats().running == 0)  # as the tool runs
        assert b": keep-alive" in read_until(leaving, b": keep-alive")
        assert running.service.active == 1
    until(running.quiet)


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "none"},
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "own"}}]},
    ],
)
def test_chats_that_get_no_tools(http: httpx.Client, fields: dict[str, Any]) -> None:
    answer = http.post(CHAT, json=body("How much?", max_tokens=4, **fields)).json()
    assert "squall_tools" not in answer
    plain = http.post(CHAT, json=body("How much?", max_tokens=4)).json()
    assert answer["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]


def test_a_flag_without_the_other() -> None:
    with pytest.raises(InvalidRequest, match="--mcp FILE"), _tools(ServeFlags(mcp_allow=["a.b"])):
        pass


@pytest.mark.slow("two processes begin")
def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"one": PROGRAM}}))
    flags = ("--mcp", str(file), "--mcp-allow", "one.add", "--mcp-allow", "one.w*")
    with in_process(tmp_path / "stderr", *flags) as process:
        with httpx.Client(base_url=process.url, timeout=30) as client:
            plain = client.post("/tokenize", json=body("Hi")).json()["count"]
            usage = client.post(CHAT, json=body("Hi", max_tokens=1)).json()["usage"]
        assert usage["prompt_tokens"] > plain + 50
        assert process.stop() == 0


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'squall\[mcp\]'"):
        McpTools(SERVERS, ALLOW)


def test_what_the_documentation_has(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = (HERE.parents[1] / "docs" / "tools.md").read_text().split("## MCP")[1]
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mcp.json").write_text(block)
    servers = ours._read(tmp_path / "mcp.json")
    assert (list(servers), servers["files"].allow) == (["files", "far"], ["read_*"])
    assert "--mcp mcp.json --mcp-allow far.search" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"far": PROGRAM}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Model, "open", lambda: nullcontext(model))
    with scripted(model, {"What is new?": "Nothing."}):
        exec(code.replace("far.search", "far.add"), {})
    assert capsys.readouterr().out == "Nothing.\n"
