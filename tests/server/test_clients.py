"""What real clients, proxies and load balancers send beside what OpenAI's description has."""

from __future__ import annotations

import gzip
import json
import time
from typing import Any

import httpx
import pytest
from servers import Process, chat, connect, events, in_thread, read_until, until

from squall import Model

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
FEW = {"max_tokens": 1, "temperature": 0}
THINKING = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if enable_thinking %} Think, {{ style.tone }}.{% endif %}"
)
OFFER = (
    "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA",
)  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": None, "function_call": None, "audio": None},
        {"role": "assistant", "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "developer", "content": "Be nice."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": "Ann"},
    ],
)
def test_messages_as_clients_send_them_back(http: httpx.Client, message: dict[str, Any]) -> None:
    """And /tokenize counts what a chat is billed."""
    body = {"messages": [USER, message, USER]}
    found = http.post(CHAT, json=body | FEW)
    assert found.status_code == 200, found.text
    counted = http.post("/tokenize", json=body).json()["count"]
    assert counted == found.json()["usage"]["prompt_tokens"]


def test_tokenize_refuses_what_a_chat_refuses(http: httpx.Client) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function"}]}
    for path in (CHAT, "/tokenize"):
        error = http.post(path, json={"messages": [USER, called]}).json()["error"]
        assert error["param"] == "messages[1].tool_calls"


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False, "top_logprobs": 0},
        {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"n": None, "stop": None, "stream": None, "user": "me", "metadata": {"a": "b"}},
        {"add_generation_prompt": True, "continue_final_message": False, "documents": []},
    ],
)
def test_fields_without_effect(http: httpx.Client, fields: dict[str, Any]) -> None:
    found = http.post(CHAT, json=chat(**FEW) | fields)
    assert found.status_code == 200, found.text
    assert "x-squall-ignored" not in found.headers


@pytest.mark.parametrize("stream", [False, True])
def test_fields_nobody_knows_are_ignored_and_told(
    http: httpx.Client, server: Process, stream: bool
) -> None:
    strange = {"max_token": 5, "dynatemp_range": 1, "tokenize": False, "a\r\nSet-Cookie: é": 1}
    found = http.post(CHAT, json=chat(stream=stream, **FEW) | strange)
    assert found.status_code == 200
    told = "max_token, dynatemp_range, tokenize, a??Set-Cookie???"
    assert found.headers["x-squall-ignored"] == told
    until(lambda: found.headers["x-request-id"] in server.stderr())
    (line,) = (x for x in server.stderr().splitlines() if found.headers["x-request-id"] in x)
    assert json.loads(line)["ignored"] == told


def test_many_unknown_fields_make_no_long_header(http: httpx.Client) -> None:
    found = http.post(CHAT, json=chat(**FEW) | {f"x{i:0>200}": i for i in range(1000)})
    assert found.status_code == 200
    assert len(found.headers["x-squall-ignored"]) < 1200
    assert found.headers["x-squall-ignored"].endswith(", ...")


def test_strict_fields(model: Model) -> None:
    with (
        in_thread(model, strict_fields=True) as running,
        httpx.Client(base_url=running.url) as http,
    ):
        for path in (CHAT, "/v1/completions", "/tokenize"):
            body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [USER]}
            found = http.post(path, json=body | {"max_token": 5})
            assert (found.status_code, found.json()["error"]["param"]) == (400, "max_token")
        assert http.post(CHAT, json=chat(user="me", **FEW)).status_code == 200


def test_variables_for_the_template(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "chat_template", model.chat_template.replaced(THINKING))
    given = {"enable_thinking": True, "style": {"tone": "softly"}}
    with in_thread(model) as running, httpx.Client(base_url=running.url) as http:
        for path in (CHAT, "/tokenize"):
            for kwargs, text in ((given, "Hi Think, softly."), ({}, "Hi"), (None, "Hi")):
                fields = FEW if path == CHAT else {}
                body = {"messages": [USER], "chat_template_kwargs": kwargs, **fields}
                found = http.post(path, json=body).json()
                count = found["count"] if path != CHAT else found["usage"]["prompt_tokens"]
                assert count == len(model.encode(text, add_bos=False))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"messages": []},
        {"tools": []},
        {"chat_template": "{{ 1 }}"},
        {"add_generation_prompt": False},
        {"tokenize": True},
        {"bos_token": "x"},
        {"long": "x" * 20_000},
        [1],
        "enable_thinking",
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_row_s2_what_templates_are_not_given(http: httpx.Client, path: str, kwargs: Any) -> None:
    found = http.post(path, json={"messages": [USER], "chat_template_kwargs": kwargs})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "chat_template_kwargs"


def test_the_range_of_dry(http: httpx.Client) -> None:
    body = chat("one two three " * 20, max_tokens=12, temperature=0, ignore_eos=True)
    dry = {"dry_multiplier": 5, "dry_allowed_length": 1, "dry_sequence_breakers": []}
    texts = {
        http.post(CHAT, json=body | fields).json()["choices"][0]["message"]["content"]
        for fields in ({}, dry, dry | {"dry_range": 4})
    }
    assert len(texts) == 3
    error = http.post(CHAT, json=body | dry | {"dry_range": 0}).json()["error"]
    assert error["param"] == "dry_range"


def test_every_chunk_of_a_chat_has_a_content(http: httpx.Client) -> None:
    found = events(http.post(CHAT, json=chat(stream=True, n=2, max_tokens=3)).text)
    choices = [choice for event in found[:-1] for choice in event["choices"]]
    assert all(isinstance(choice["delta"]["content"], str) for choice in choices)
    assert [c["delta"] for c in choices if c["finish_reason"]] == [{"content": ""}] * 2


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/small", "/metrics"])
def test_head_is_get_without_the_body(http: httpx.Client, path: str) -> None:
    found, asked = http.head(path), http.get(path)
    assert (found.status_code, found.content) == (200, b"")
    assert found.headers["content-type"] == asked.headers["content-type"]
    assert http.head(CHAT).status_code == 405


def test_paths_with_a_slash_at_the_end(http: httpx.Client) -> None:
    assert http.get("/v1/models/").json() == http.get("/v1/models").json()
    assert http.post(CHAT + "/", json=chat(**FEW)).status_code == 200


def test_options(http: httpx.Client) -> None:
    for path, methods in ((CHAT, {"POST"}), ("/v1/models", {"GET", "HEAD"})):
        found = http.options(path)
        assert (found.status_code, found.content) == (204, b"")
        assert set(found.headers["allow"].split(", ")) == methods | {"OPTIONS"}
    assert http.options("/nothing").status_code == 404


def test_a_preflight_may_ask_for_any_header(model: Model) -> None:
    wanted = "authorization,content-type,x-stainless-arch,x-stainless-helper-method"
    origin = "http://localhost:3000"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    options = {"origins": (origin,), "api_keys": ("k",)}
    with in_thread(model, **options) as running, httpx.Client(base_url=running.url) as http:
        found = http.options(CHAT, headers=asked | {"Origin": origin})
        assert found.status_code == 200
        assert found.headers["access-control-allow-headers"] == wanted
        assert found.headers["access-control-allow-origin"] == origin
        stranger = http.options(CHAT, headers=asked | {"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers
        assert http.options(CHAT).status_code == 204  # tells nothing that /docs does not


def test_byte_order_marks_and_compression(http: httpx.Client) -> None:
    body = json.dumps(chat(**FEW)).encode()
    assert http.post(CHAT, content=b"\xef\xbb\xbf" + body).status_code == 200
    assert (
        http.post(CHAT, content=body, headers={"Content-Encoding": "identity"}).status_code == 200
    )
    for encoding in ("gzip", "br", "deflate"):
        found = http.post(CHAT, content=gzip.compress(body), headers={"Content-Encoding": encoding})
        assert (found.status_code, found.json()["error"]["code"]) == (415, "unsupported_encoding")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_offers_of_http_2_are_declined(server: Process, parts: int, chunked: bool) -> None:
    """Java's client makes one with each request; it and its body stay valid (RFC 9110, 7.8)."""
    body = json.dumps(chat(**FEW)).encode()
    size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = "\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: 127.0.0.1", *OFFER, size, "", ""]).encode()
    half = len(body) // 2
    pieces = [body[:half], body[half:]] if parts == 3 else [body]
    if chunked:
        pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
        pieces[-1] += b"0\r\n\r\n"
    sent = [head + pieces[0]] if parts == 1 else [head, *pieces]
    with connect(server.port) as connection:
        for piece in sent:
            connection.sendall(piece)
        read = read_until(connection, b"nothing like this")
    assert read.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in read.lower()
    assert b'"chat.completion"' in read


@pytest.mark.parametrize("end", ["\r", "\r\n", "\r\nUp", "\r\nUpgrade: h", "\r\nUpgrade: h2c\r"])
def test_an_offer_may_come_in_parts(server: Process, end: str) -> None:
    body = json.dumps(chat(**FEW))
    lines = [f"POST {CHAT} HTTP/1.1", "Host: 127.0.0.1", *OFFER, f"Content-Length: {len(body)}"]
    sent = "\r\n".join([*lines, "", body])
    cut = sent.index("\r\nUpgrade") + len(end)
    with connect(server.port, sent[:cut].encode()) as connection:
        time.sleep(0.05)
        connection.sendall(sent[cut:].encode())
        assert read_until(connection, b'"chat.completion"').startswith(b"HTTP/1.1 200 ")


def test_offers_with_nothing_else(server: Process) -> None:
    for upgrade in ("h2c", "websocket"):
        lines = ["GET /health HTTP/1.1", "Host: 127.0.0.1", "Connection: Upgrade"]
        head = "\r\n".join([*lines, f"Upgrade: {upgrade}", "", ""]).encode()
        with connect(server.port, head) as connection:
            assert read_until(connection, b"nothing like this").startswith(b"HTTP/1.1 200 ")
