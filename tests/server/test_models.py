"""Several models in one server, each request for one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import chat, in_thread, until
from starlette.testclient import TestClient

from squall import ChatCompletionRequest, EngineConfig, InvalidRequest, Model
from squall.api.jobs import start_chat
from squall.server.app import create_app, service_of

CHAT = "/v1/chat/completions"
PLAIN = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
FIELDS: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def other() -> Iterator[Model]:
    """The same weights, asked in another way."""
    config = EngineConfig(max_seqs=2, max_queue=4)
    with Model.open(context=256, engine=config) as found:
        found.set_chat_template(PLAIN)
        yield found


@pytest.fixture
def both(model: Model, other: Model) -> Iterator[TestClient]:
    models = {"chat/one": model, "two": other}
    with TestClient(create_app(models)) as client:
        yield client
    for found in models.values():
        found.engine.on_death = None


def alone(model: Model) -> str:
    asked = ChatCompletionRequest(messages="The sea is", **FIELDS)
    return start_chat(model, asked).response().choices[0].message.content


def test_each_answers_as_it_does_alone(both: TestClient, model: Model, other: Model) -> None:
    expected = {"chat/one": alone(model), "two": alone(other)}
    assert len(set(expected.values())) == 2
    for name, text in expected.items():
        found = both.post(CHAT, json=chat("The sea is", model=name, **FIELDS)).json()
        assert (found["model"], found["choices"][0]["message"]["content"]) == (name, text)
        told = both.post("/tokenize", json={"messages": "The sea is", "model": name}).json()
        assert told["count"] == found["usage"]["prompt_tokens"]
    first = both.post(CHAT, json=chat("The sea is", **FIELDS)).json()
    assert first["model"] == "chat/one"


def test_names(both: TestClient, model: Model, other: Model) -> None:
    data = both.get("/v1/models").json()["data"]
    sizes = {card["id"]: card["max_model_len"] for card in data}
    assert sizes == {"chat/one": model.context, "two": other.context}
    assert both.get("/v1/models/chat/one").json() == data[0]
    for found in (both.post(CHAT, json=chat(model="three")), both.get("/v1/models/three")):
        error = found.json()["error"]
        assert (found.status_code, error["code"]) == (404, "model_not_found")
        assert "'chat/one', 'two'" in error["message"]


def test_metrics_are_of_a_model(both: TestClient) -> None:
    def tokens() -> dict[str, float]:
        families = text_string_to_metric_families(both.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        found = {
            s.labels["model"]: s.value for s in samples if s.name == "squall_answer_tokens_total"
        }
        firsts = "squall_time_to_first_token_seconds_count"
        assert {s.labels["model"] for s in samples if s.name == firsts} <= found.keys()
        return found

    before = tokens()
    both.post(CHAT, json=chat(model="two", **FIELDS))
    news = {name: count - before[name] for name, count in tokens().items()}
    assert news == {"chat/one": 0, "two": 8}


def test_one_that_is_dead_ends_the_server(both: TestClient) -> None:
    service = service_of(both.app)  # type: ignore[arg-type]
    assert both.get("/health").status_code == 200
    assert both.portal is not None
    both.portal.call(service.models["two"].die, "the engine was stopped")
    assert both.get("/health").status_code == 503
    for name in ("chat/one", "two"):
        assert both.post(CHAT, json=chat(model=name)).status_code == 503
    assert [served.name for served in service.failed] == ["two"]


def test_there_must_be_one() -> None:
    with pytest.raises(InvalidRequest, match="no model"):
        create_app({})


def test_one_model_answers_to_any_name(model: Model) -> None:
    with in_thread(model, model_id="mine") as running, httpx.Client(base_url=running.url) as http:
        for name in ("mistral", "gpt-4o", "", "../x", "mine", "default", None):
            found = http.post(CHAT, json=chat(model=name, max_tokens=1)).json()
            assert found["model"] == "mine"
        assert http.get("/v1/models/mistral").status_code == 404
        until(running.quiet)


def test_row_s11_names_that_look_like_paths(model: Model) -> None:
    options = {"model_id": "small", "any_model": False}
    with in_thread(model, **options) as running, httpx.Client(base_url=running.url) as http:
        for name in ("../x", "%2e%2e%2fx", "x\0y", "/etc/passwd", "a" * 10_000, "é"):
            found = http.post(CHAT, json=chat(model=name))
            error = found.json()["error"]
            assert (found.status_code, error["code"]) == (404, "model_not_found")
            assert len(error["message"]) < 1000
            assert ".gguf" not in error["message"]
