"""Who may ask: keys, hosts, origins; and what the logs say of it."""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from servers import Running, chat, connect, in_thread, read_until, until

from squall import InvalidRequest, Model
from squall.server.gate import OPEN_PATHS
from squall.server.options import LOOPBACK, ServerOptions, keep_alive_s

PATH = "/v1/chat/completions"
KEYS = ("key-of-a", "key-of-b")
PAGE = "https://pages.example"
# Written by hand: a route that is added must come here too, or the test of keys fails.
ROUTES = {
    ("GET", "/"), ("GET", "/health"), ("GET", "/docs"), ("GET", "/openapi.json"),
    ("GET", "/api-doc/openapi.json"), ("GET", "/metrics"), ("GET", "/v1/models"),
    ("GET", "/v1/models/x"), ("POST", PATH), ("POST", "/v1/completions"), ("POST", "/tokenize"),
    ("POST", "/detokenize"), ("POST", "/render"), ("POST", f"{PATH}/render"),
    ("POST", "/v1/completions/render"), ("POST", "/v1/responses"),
    ("GET", "/v1/responses/x"), ("DELETE", "/v1/responses/x"), ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"), ("POST", "/re_isq"), ("POST", "/activate_adapters"),
    ("POST", "/v1/images/generations"), ("GET", "/v1/nothing"), ("GET", "/v1/adapters"),
    ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/x"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"), ("POST", "/v1/images/edits"), ("GET", "/images/x"),
    ("GET", "/ui"), ("GET", "/ui/x"), ("POST", "/v1/embeddings"), ("POST", "/v1/rerank"),
    ("POST", "/rerank"), ("POST", "/infill"), ("POST", "/v2/rerank"), ("POST", "/v1/models/x/load"),
    ("POST", "/v1/models/x/unload"), ("POST", "/api/chat"), ("POST", "/api/generate"),
    ("POST", "/api/embed"), ("POST", "/api/embeddings"), ("GET", "/api/tags"), ("GET", "/api/ps"),
    ("POST", "/api/show"), ("POST", "/api/pull"), ("DELETE", "/api/delete"),
    ("GET", "/api/version"),
}  # fmt: skip


@pytest.fixture(scope="module")
def running(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("log") / "bodies"
    options = {"api_keys": KEYS, "origins": (PAGE,), "hosts": LOOPBACK, "any_model": False}
    with in_thread(model, log=log, throughput=True, **options) as found:
        yield found


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
@pytest.mark.parametrize("header", ["", "Bearer wrong", "Bearer", "Basic a2V5", "key-of-a"])
def test_row_s8_every_route_asks_for_a_key(
    http: httpx.Client, method: str, path: str, header: str
) -> None:
    response = http.request(method, path, headers={"Authorization": header}, content=b"{}")
    if path in {"/", "/health", "/docs", "/ui"}:
        assert response.status_code == 200
        return
    if path in {"/images/x", "/ui/x"}:  # whose name is the key, and a file that is the same for all
        assert response.status_code == 404
        return
    assert response.status_code == 401
    told = response.json()["error"]
    if path.startswith("/api/"):  # as Ollama tells it
        assert "API key" in told
    else:
        assert told["type"] == "authentication_error"
    assert response.headers["www-authenticate"] == "Bearer"
    assert http.request(method, path, headers=bearer(KEYS[0]), content=b"{}").status_code != 401


CHANGES = {
    "/re_isq", "/activate_adapters", "/v1/adapters", "/v1/adapters/x", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/models/x/load", "/v1/models/x/unload", "/api/pull",
    "/api/delete",
}  # fmt: skip


@pytest.mark.parametrize("keys", [KEYS, ()])
def test_row_s8_what_changes_models_has_a_key_of_its_own(
    model: Model, keys: tuple[str, ...]
) -> None:
    with (
        in_thread(model, api_keys=keys, admin_key="admin") as found,
        httpx.Client(base_url=found.url) as http,
    ):
        for method, path in sorted(ROUTES):
            changes = method != "GET" and path in CHANGES
            for key, may in (
                ("admin", True),
                (KEYS[0], not changes),
                ("wrong", not (changes or keys)),
            ):
                given = http.request(method, path, headers=bearer(key), content=b"{}").status_code
                free = path in {"/", "/health", "/docs", "/ui", "/ui/x", "/images/x"}
                assert (given != 401) == (may or free), (method, path, key, given)


@pytest.mark.parametrize("key", ["", "two\nlines", " a", "\u00e4"])
def test_what_is_no_key(key: str) -> None:
    for fields in ({"api_keys": (key,)}, {"admin_key": key}):
        with pytest.raises(InvalidRequest, match="printable ASCII"):
            ServerOptions(**fields)  # type: ignore[arg-type]


def test_row_s8_no_route_is_forgotten(running: Running) -> None:
    def paths(routes: Any) -> Iterator[str]:
        for route in routes:
            if hasattr(route, "path"):
                yield route.path
            yield from paths(getattr(getattr(route, "original_router", None), "routes", ()))

    app: Any = running.server.config.app
    found = {re.sub(r"\{\w+(:path)?\}", "x", path) for path in paths(app.routes)}
    assert found == {path for _, path in ROUTES} - {"/v1/nothing"}
    assert frozenset({"/", "/health", "/docs", "/ui"}) == OPEN_PATHS


@pytest.mark.parametrize("key", KEYS)
def test_both_ways_to_give_a_key(http: httpx.Client, key: str) -> None:
    assert http.get("/v1/models", headers=bearer(key)).status_code == 200
    assert http.get("/v1/models", headers={"X-Api-Key": key}).status_code == 200
    assert http.get("/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200


def test_row_s17_keys_share_no_cache(http: httpx.Client) -> None:
    body = chat("A secret. " * 30, max_tokens=1)

    def cached(key: str) -> int:
        usage = http.post(PATH, json=body, headers=bearer(key)).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    assert cached(KEYS[0]) == 0
    assert cached(KEYS[0]) > 50
    assert cached(KEYS[1]) == 0
    assert cached(KEYS[1]) > 50


def test_row_10_cached_prefixes_change_no_bit(http: httpx.Client) -> None:
    """Cold, warm, for another tenant, and once it was evicted."""
    body = chat("Once upon a time " * 20, max_tokens=12, logprobs=True, top_logprobs=5)

    def answer(key: str, known: bool) -> Any:
        found = http.post(PATH, json=body | {"temperature": 0}, headers=bearer(key)).json()
        assert (found["usage"]["prompt_tokens_details"]["cached_tokens"] > 60) == known
        return found["choices"]

    cold = answer(KEYS[0], False)
    assert [answer(KEYS[0], True) for _ in range(4)] == [cold] * 4
    assert [answer(KEYS[1], known) for known in (False, True)] == [cold] * 2
    for i in range(4):
        other = chat(f"{i} " * 440, max_tokens=1)
        assert http.post(PATH, json=other, headers=bearer(KEYS[1])).status_code == 200
    assert [answer(KEYS[0], known) for known in (False, True)] == [cold] * 2


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("localhost:80", True),
        ("127.0.0.1:1", True),
        ("[::1]:5", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("", False),
        ("[", False),
    ],
)
def test_a_name_that_is_not_ours(running: Running, host: str, allowed: bool) -> None:
    """DNS rebinding: a page's own name that points here."""
    request = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    with connect(running.port, request.encode()) as connection:
        status = read_until(connection, b"\r\n").split(b" ")[1]
    assert status in ([b"200"] if allowed else [b"400", b"403"])


def test_pages(http: httpx.Client) -> None:
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    good = http.options(PATH, headers={"Origin": PAGE, **asks})
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == PAGE
    assert http.options(PATH, headers={"Origin": "https://evil.example", **asks}).status_code == 400
    answer = http.post(PATH, json=chat(max_tokens=1), headers={"Origin": PAGE, **bearer(KEYS[0])})
    assert answer.headers["access-control-allow-origin"] == PAGE
    evil = http.post(
        PATH, json=chat(max_tokens=1), headers={"Origin": "https://evil.example", **bearer(KEYS[0])}
    )
    assert evil.status_code == 403
    own = http.get("/health", headers={"Origin": str(http.base_url).rstrip("/")})
    assert own.status_code == 200


def test_row_s19_logs_cannot_be_forged(
    running: Running,
    http: httpx.Client,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = running.service.options.log
    assert log is not None
    before = len(log.read_text().splitlines())
    monkeypatch.setattr(running.service.log, "_stream", sys.stderr)
    forged = 'x"}\r\n{"status": 200, "path": "/forged"}\x1b[2J'
    path = "/v1/" + quote(forged)
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n\r\n"
    with connect(running.port, head.encode()) as connection:
        read_until(connection, b"unknown_url")
    http.post(PATH, json=chat(forged, model=forged), headers=bearer(KEYS[0]))
    until(running.quiet)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["status"] for line in lines] == [404, 404]
    kept = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    assert [sorted(line.keys() - {"time", "id"}) for line in kept] == [
        ["error"], ["request"], ["error"],
    ]  # fmt: skip
    assert json.loads(kept[1]["request"])["model"] == forged


def test_logs_tell_of_an_answer(
    running: Running,
    http: httpx.Client,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = running.service.options.log
    assert log is not None
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    monkeypatch.setattr(running.service.log, "_stream", sys.stderr)
    headers = bearer(KEYS[0]) | {"X-Request-Id": "mine"}
    http.post(PATH, json=chat("Hi there", max_tokens=3), headers=headers)
    until(running.quiet)
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["completion_tokens"] == 3
    assert line["id"] == "mine"
    assert line["completion_tokens_per_second"] > 0
    request, response = map(json.loads, log.read_text().splitlines()[-2:])
    assert "Hi there" in request["request"]
    assert json.loads(response["response"])["usage"]["completion_tokens"] == 3
    text = log.read_text() + json.dumps(line)
    assert not any(key in text for key in KEYS)


def test_the_documentation_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs").text
    assert "/v1/chat/completions" in page
    assert "http://" not in page
    assert "https://" not in page
    first, second = (
        http.get(path, headers=bearer(KEYS[0])).json()
        for path in ("/openapi.json", "/api-doc/openapi.json")
    )
    assert first == second
    assert "ChatBody" in first["components"]["schemas"]


@pytest.mark.parametrize("key", ["", " x", "é", "a\nb"])
def test_keys_that_cannot_be_sent(key: str) -> None:
    with pytest.raises(InvalidRequest, match="API key"):
        ServerOptions(api_keys=(key,))


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", "9" * 30])
def test_keep_alive_interval(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KEEP_ALIVE_INTERVAL", "250")
    assert keep_alive_s() == 0.25
    monkeypatch.setenv("KEEP_ALIVE_INTERVAL", text)
    with pytest.raises(InvalidRequest, match="KEEP_ALIVE_INTERVAL"):
        keep_alive_s()


def test_a_log_that_cannot_be_written(model: Model, tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidRequest, match="cannot write the log"),
        in_thread(model, log=tmp_path / "none" / "x"),
    ):
        pass
