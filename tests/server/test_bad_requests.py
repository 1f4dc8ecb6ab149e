"""Whatever is sent: an error that names what is wrong, never 5xx, and others do not notice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from random_models import write_random
from servers import Process, chat, connect, in_process, post_bytes, read_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
COMMON: dict[str, float] = {
    "max_tokens": 1, "n": 1, "seed": 1, "temperature": 1, "top_p": 1, "top_k": 1, "min_p": 0,
    "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_tokens": 0,
    "dry_multiplier": 1, "dry_base": 1, "dry_allowed_length": 2, "dry_range": 9,
}  # fmt: skip
NEVER_A_NUMBER = ('"1"', "NaN", "Infinity", "-Infinity", "1e999", "[1]", "{}", "true")
NUMBERS = ("-1", "0", "1.5", str(2**31), str(2**63), "-" + str(2**63), "9" * 400)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("server")
    model = write_random(folder / "small.gguf")
    with in_process(folder / "stderr", str(model)) as found:
        yield found
        assert found.stop() == 0
        assert '"level": "error"' not in found.stderr()


@pytest.fixture(scope="module", autouse=True)
def _a_stream_alongside(server: Process) -> Iterator[None]:
    """Row 4: while all that goes on, a control stream stays the same, byte for byte."""
    body = chat("Tell a story.", max_tokens=60, temperature=1, seed=5, ignore_eos=True)
    found: list[str] = []
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not done.wait(1.0):
                answer = client.post(CHAT, json=body).json()
                found.append(answer["choices"][0]["message"]["content"])

    alone = httpx.post(server.url + CHAT, json=body, timeout=60).json()
    thread = threading.Thread(target=ask)
    thread.start()
    yield
    done.set()
    thread.join()
    assert set(found) == {alone["choices"][0]["message"]["content"]}


def check_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert code is None or error["code"] == code
    return error


@pytest.mark.parametrize("field", COMMON)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_row_s13_numbers_out_of_range(http: httpx.Client, path: str, field: str) -> None:
    prompt = {"messages": "Hi"} if path == CHAT else {"prompt": "Hi"}
    for value in NEVER_A_NUMBER + NUMBERS:
        fields = {
            k: json.dumps(v) for k, v in (prompt | {"max_tokens": 1, "stop": [*"aeiou ,."]}).items()
        }
        text = ", ".join(f'"{k}": {v}' for k, v in (fields | {field: value}).items())
        response = http.post(path, content="{" + text + "}")
        if value in NEVER_A_NUMBER:
            assert check_error(response, 400)["param"] == field, value
        elif response.status_code != 200:
            check_error(response, 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, None),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a"] * 100}, "stop"),
        ({"stop": ["a" * 10**5]}, None),
        ({"stop": ""}, None),
        ({"logit_bias": {"99999999": 1}}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": None}}, "logit_bias.1"),
        ({"stop_token_ids": [10**9]}, None),
        ({"tools": [{"type": "function", "function": {"name": "f f"}}]}, "tools[0]"),
        ({"tools": {}}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_json": {"type": "objet"}}, "guided_json"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "a"}}, "audio"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
        ({"grammar": {"type": "regex", "value": "(a"}}, "grammar"),
        ({"grammar": {"type": "perl", "value": "a"}}, "grammar"),
        ({"grammar": "a"}, "grammar"),
        ({"adapters": [5]}, "adapters[0]"),
        ({"adapters": {"x" * 1000: "much"}}, "adapters." + "x" * 100),
        ({"logits_processors": ["os.system"]}, "logits_processors"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": 5}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    ],
)
def test_row_4_bad_fields_are_named(
    http: httpx.Client, fields: dict[str, Any], param: str | None
) -> None:
    error = check_error(http.post(CHAT, json=chat(max_tokens=1) | fields), 400)
    if param is not None:
        assert error["param"] == param, error


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": [2**31]},
        {"prompt": [10**30]},
        {"prompt": [True]},
        {"prompt": [None]},
        {"prompt": ["a"] * 5000},
        {"prompt": ["a"] * 100, "n": 100},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "best_of": 1000},
        {"prompt": "x", "logprobs": 1000},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "word " * 5000},
        {},
    ],
)
def test_bad_completions(http: httpx.Client, fields: dict[str, Any]) -> None:
    check_error(http.post(TEXT, json={"max_tokens": 1} | fields), 400)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": "\xff"}',
        b'{"messages": "\\ud800"}',
        b'{"messages": "x", "messages": 5}',
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 100_000,
        b'{"metadata": ' + b'{"a":' * 100_000,
        b'{"messages": "x", "seed": ' + b"1" * 100_000 + b"}",
        b"\x00" * 1000,
    ],
)
def test_row_4_bodies_that_are_no_json(http: httpx.Client, data: bytes) -> None:
    check_error(http.post(CHAT, content=data), 400)


def test_row_s15_a_body_of_50_mb(server: Process, http: httpx.Client) -> None:
    declared = connect(server.port, b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    with declared:
        declared.sendall(b"Content-Length: 50000000\r\n\r\n")
        assert b" 413 " in read_until(declared, b"request_too_large")

    def parts() -> Iterator[bytes]:
        # Nothing says how much there is to come.
        for _ in range(33):
            yield b" " * 2**20

    check_error(http.post(CHAT, content=parts()), 413, "request_too_large")


def test_row_s15_a_million_messages(http: httpx.Client) -> None:
    check_error(http.post(CHAT, content=b'{"messages":[' + b'{"role":""},' * 10**6), 400)
    data = b'{"messages":[' + b"{}," * 10**6 + b"{}]}"
    check_error(http.post(CHAT, content=data), 400)
    good = b'{"role":"","content":""}'
    data = b'{"messages":[' + (good + b",") * 600_000 + good + b"]}"
    check_error(http.post(CHAT, content=data), 400)


@pytest.mark.parametrize(
    "data",
    [
        b'{"messages":"x","metadata":[' + b"{}," * 10**6 + b"1]}",
        b'{"messages":"x","metadata":[' + b"[[]]," * 10**6 + b"1]}",
        b'{"messages":"x","stop":[' + b'"a",' * 2 * 10**6 + b'"a"]}',
        b'{"messages":[{"role":"user","content":[' + b'{"type":"text"},' * 10**6 + b"{}]}]}",
        b'{"prompt":[' + b"1," * 4 * 10**6 + b"1]}",
        b"{" + b",".join(b'"%d":1' % i for i in range(10**6)) + b"}",
    ],
    ids=["objects", "lists", "texts", "parts", "numbers", "fields"],
)
def test_row_s15_bodies_that_are_slow_to_read(http: httpx.Client, data: bytes) -> None:
    """They are not read at all, since that would keep all others waiting."""
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        check_error(http.post(path, content=data), 400, "too_many_values")


def test_long_texts_may_hold_many_commas_and_braces(http: httpx.Client) -> None:
    text = '{"a": [1, 2, 3]}, ' * 5000
    check_error(http.post(CHAT, json=chat(text)), 400, "context_length_exceeded")


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_row_s15_a_million_answers(http: httpx.Client, path: str) -> None:
    fields = {"messages": "x"} if path == CHAT else {"prompt": "x"}
    for name in ("n", "best_of")[: 1 + (path == TEXT)]:
        assert check_error(http.post(path, json={**fields, name: 10**6}), 400)["param"] == name


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ 1 }}"},
        {"documents": [{}]},
    ],
)
def test_row_s2_nothing_for_the_template_but_messages(
    http: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    body = {"prompt": "x"} if path == TEXT else {"messages": chat()["messages"]}
    assert check_error(http.post(path, json=body | fields), 400)["param"] == next(iter(fields))


def test_paths_and_methods(http: httpx.Client) -> None:
    check_error(http.get("/v1/nothing"), 404, "unknown_url")
    check_error(http.get(CHAT), 405, "method_not_allowed")
    check_error(http.get("/v1/models/../../etc/passwd"), 404)
    check_error(http.post("/v1/images/generations", json={"prompt": "x"}), 400, "wrong_model")


@pytest.mark.parametrize(
    "fields",
    [{}, {"prompt": "x", "messages": []}, {"prompt": 5}, {"messages": [{"role": "user"}]}],
)
def test_bad_tokenize(http: httpx.Client, fields: dict[str, Any]) -> None:
    check_error(http.post("/tokenize", json=fields), 400)


@pytest.mark.parametrize("tokens", [[-1], [2**31], ["a"], None, [10**40], 5])
def test_bad_detokenize(http: httpx.Client, tokens: Any) -> None:
    check_error(http.post("/detokenize", json={"tokens": tokens}), 400)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: a\x1b[31m\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
        post_bytes(CHAT, b"{}", "Content-Length: 5"),
        post_bytes(CHAT, b"zz\r\n", "Transfer-Encoding: chunked"),
    ],
)
def test_requests_that_are_no_http(server: Process, data: bytes) -> None:
    with connect(server.port, data) as connection:
        connection.settimeout(5)
        status = read_until(connection, b"\r\n").split(b" ")[1:2]
        assert status in ([], [b"400"], [b"403"], [b"404"], [b"413"], [b"431"])
